// A JavaScript client's end of the pipe that drives it: lines of JSON, as described in obey.py.
import { createInterface } from "node:readline";

// Standard output speaks with who drives the client, so the library's own remarks go nowhere.
for (const level of ["trace", "debug", "info", "log", "warn", "error"]) console[level] = () => {};
export const tell = (line) => process.stdout.write(JSON.stringify(line) + "\n");
export const saw = (what) => tell({ saw: what });

// Carries out commands until there are no more; each beside the others, as a client does what it is asked.
export async function obey(commands) {
  for await (const line of createInterface({ input: process.stdin })) {
    const { id, do: verb, ...rest } = JSON.parse(line);
    carryOut(id, () => commands[verb](rest));
  }
}

async function carryOut(id, work) {
  try {
    tell({ id, result: (await work()) ?? null });
  } catch (problem) {
    tell({ id, error: problem?.errcode ? `${problem.errcode} ${problem.message}` : String(problem?.stack ?? problem) });
  }
}
