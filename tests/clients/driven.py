"""People whose clients are processes of their own, driven by lines of JSON; obey.py says how."""

import asyncio
import json
import secrets
import shlex
import sys

# Before its first answer a client loads its libraries, which takes long on a machine that has much else to do.
START_SECONDS_MAX = 60


class Mismatch(Exception):
    """What came is not what the scenario demands."""


def equal(what, found, wanted):
    if found != wanted:
        raise Mismatch(f"{what}: {found}, not {wanted}")


class Person:
    """One client process: what it is told to do, and all it has seen so far."""

    seconds_max = 15

    def __init__(self, label):
        self.label = label
        self.seen = []
        self.news = asyncio.Condition()
        self.answers = {}
        self.user = None
        self.is_awake = False

    async def start(self, command, server):
        self.process = await asyncio.create_subprocess_exec(
            *shlex.split(command), server, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24)
        self.listening = asyncio.create_task(self.listen())

    async def listen(self):
        while line := await self.process.stdout.readline():
            try:
                line = json.loads(line)
            except ValueError:  # a library's own chatter
                print(f"[{self.label}] {line.decode().rstrip()}", file=sys.stderr)
                continue
            await self.take(line)

    async def take(self, line):
        if "saw" in line:
            async with self.news:
                self.seen.append(line["saw"])
                self.news.notify_all()
        else:
            self.is_awake = True
            self.answers.pop(line["id"]).set_result(line)

    async def ask(self, verb, **details):
        number = len(self.answers) + secrets.randbits(40)
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps({"id": number, "do": verb, **details}).encode() + b"\n")
        await self.process.stdin.drain()
        try:
            return await asyncio.wait_for(answer, self.seconds_max if self.is_awake else START_SECONDS_MAX)
        except asyncio.TimeoutError:
            raise Mismatch(f"{self.label}: no answer to {verb} {details}") from None

    async def do(self, verb, **details):
        """Does something that must succeed."""
        answer = await self.ask(verb, **details)
        if "error" in answer:
            raise Mismatch(f"{self.label}: {verb} {details} failed: {answer['error']}")
        return answer["result"]

    async def refused(self, errcode, verb, **details):
        """Does something that the server must refuse."""
        answer = await self.ask(verb, **details)
        if errcode not in answer.get("error", ""):
            raise Mismatch(f"{self.label}: {verb} {details} was not refused with {errcode}: {answer}")

    async def sees(self, kind, **details):
        """Waits until this was seen; each sight counts once."""
        wanted = {"kind": kind, **details}

        async def arrives():
            async with self.news:
                while True:
                    for sight in self.seen:
                        if sight["kind"] == "broken":
                            raise Mismatch(f"{self.label}: {sight['problem']}")
                        if wanted.items() <= sight.items():
                            self.seen.remove(sight)
                            return sight
                    await self.news.wait()

        try:
            return await asyncio.wait_for(arrives(), self.seconds_max)
        except asyncio.TimeoutError:
            raise Mismatch(
                f"{self.label} did not see {wanted} in {self.seconds_max} s, but {self.seen[-12:]}") from None

    async def stop(self):
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 5)
        except asyncio.TimeoutError:
            self.process.kill()
            await self.process.wait()
        self.listening.cancel()
