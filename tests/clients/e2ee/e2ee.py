"""Plays the scenes of encryption on one or two servers; ./run says how it is called."""

import argparse
import asyncio
import pathlib
import re
import shutil
import sys
import tempfile
import time

from scenes import SCENES
from stage import SECONDS_MAX, Mismatch, Stage
from servers import KINDS, Authority

# A scene has steps enough that each may come near to its bound without the whole being wrong.
SCENE_SECONDS_MAX = 6 * SECONDS_MAX


async def play(scene, label, stage, options):
    """Plays one scene, and says how it went."""
    begun = time.monotonic()
    marks = [server.log.stat().st_size for server in stage.servers]
    try:
        await asyncio.wait_for(scene.play(stage, scene.kind), SCENE_SECONDS_MAX)
        for friend in stage.friends:
            friend.was_given_once()
        problem = ""
    except Mismatch as mismatch:
        problem = str(mismatch)
    except asyncio.TimeoutError:
        problem = f"it did not end within {SCENE_SECONDS_MAX} s"
    finally:
        await stage.close()
    print(f"{'FAILED' if problem else 'ok':<8}{label:<60}{time.monotonic() - begun:6.1f} s  {problem}".rstrip(), flush=True)
    for server, mark in zip(stage.servers, marks):
        if problem and options.logs:
            print(f"--- log of {server}\n{server.tail(options.logs, mark)}\n---", flush=True)
    return not problem


async def play_all(servers, commands, options):
    """Plays all scenes for which there are servers enough; returns how many failed, and how many did not."""
    chosen = []
    for scene in SCENES:
        label = " ".join(filter(None, (scene.play.__name__, scene.kind, "on", *map(str, servers))))
        if len(servers) >= scene.servers_min and re.search(options.only, label):
            chosen.append((scene, label, Stage(servers, commands), options))
    free = asyncio.Semaphore(options.jobs)

    async def play_beside(scene, *rest):
        async with free:
            return await play(scene, *rest)

    outcomes = await asyncio.gather(*(play_beside(*it) for it in chosen if not it[0].is_alone))
    for it in chosen:
        if it[0].is_alone:
            outcomes.append(await play(*it))
            for server in servers:
                await asyncio.to_thread(server.recover)
    return outcomes.count(False), outcomes.count(True)


def on_servers(kinds, commands, options):
    """Starts servers of these kinds, and plays; returns what went wrong, and how many scenes went well."""
    dir = pathlib.Path(tempfile.mkdtemp(prefix="aqueduct-e2ee-"))
    authority = Authority(dir)
    labels = [kind if kind not in kinds[:number] else f"{kind}-{number + 1}" for number, kind in enumerate(kinds)]
    servers = [KINDS[kind](label, f"127.0.0.{number}", dir, authority)
               for number, (kind, label) in enumerate(zip(kinds, labels), 1)]
    problems, well = [], 0
    try:
        for server in servers:
            server.start()
        failed, well = asyncio.run(play_all(servers, commands, options))
        if failed:
            problems.append(f"{failed} scenes failed on {', '.join(labels)}")
    finally:
        for server in servers:
            try:
                server.stop()
            except RuntimeError as error:
                problems.append(str(error))
            finally:
                server.kill()
            problems += [f"{server} panicked: {line}" for line in server.panics()]
        if options.keep:
            print(f"kept: {dir}")
        else:
            shutil.rmtree(dir, ignore_errors=True)
    return problems, well


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="+", metavar="KIND=COMMAND", help="the clients")
    parser.add_argument("--servers", action="append", metavar="KIND[,KIND]", help="one server, or two that federate")
    parser.add_argument("--only", metavar="REGEX", default="", help="scenes whose line matches")
    parser.add_argument("--jobs", type=int, default=2, help="scenes played at once")
    parser.add_argument("--logs", type=int, default=0, metavar="LINES", help="last lines of logs to print with a failure")
    parser.add_argument("--keep", action="store_true", help="leave the servers' directories for looking into")
    options = parser.parse_args()
    commands = dict(client.split("=", 1) for client in options.clients)
    problems, well = [], 0
    for servers in options.servers or ("aqueduct", "aqueduct,aqueduct"):
        found, played = on_servers(servers.split(","), commands, options)
        problems, well = problems + found, well + played
    if not problems and not well:
        problems.append("no scene matches")
    for problem in problems:
        print(problem)
    print(f"{well} scenes went well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
