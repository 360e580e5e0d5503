"""Plays the scenarios between two homeservers; ./run says how it is called.

A line a case: ok, or FAILED with the reason. Cases play at once, save those that cut servers off or
restart them. Fails when a case failed, a server panicked, or did not end as it should.
"""

import argparse
import concurrent.futures
import contextlib
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback

import encryption
import scenarios
from people import Mismatch, Person
from servers import KINDS, Authority

# Every scenario is played in these versions, in the others only those that concern how versions differ, unless --full demands all.
FULL_VERSIONS = ("10", "11", "12")


class Stage:
    """One case: the server where its room begins, the other one, and the room version."""

    def __init__(self, scenario, here, there, version):
        self.scenario, self.here, self.there, self.version = scenario, here, there, version
        self.label = f"{scenario.name} v{version} {here}->{there}"

    def person(self, server, name="alice"):
        return Person(server, name)

    @property
    def is_newest(self):
        return self.version == FULL_VERSIONS[-1]


def room_versions(server):
    told = Person(server, "versions").call("GET", "/capabilities")["capabilities"]["m.room_versions"]["available"]
    return [version for version, stability in told.items() if stability == "stable"]


def cases(servers, versions, is_full=False):
    """In the order in which they are played: shared stages first."""
    one, other = servers
    directions = [(one, other), (other, one)]
    if one.kind == other.kind:
        directions.pop()
    for alone in False, True:
        for scenario in scenarios.ALL:
            for version in sorted(versions, key=lambda it: (it not in FULL_VERSIONS, int(it))):
                is_played = scenario.is_short or is_full or version in FULL_VERSIONS
                if scenario.is_alone == alone and is_played and scenario.knows(version):
                    for here, there in directions:
                        yield Stage(scenario, here, there, version)


class Report:
    def __init__(self, servers, log_lines):
        self.servers, self.log_lines = servers, log_lines
        self.lock = threading.Lock()
        self.failed, self.passed = [], 0

    def play(self, stage):
        begun = time.monotonic()
        marks = {server: server.log.stat().st_size for server in self.servers}
        try:
            stage.scenario.play(stage)
            outcome, why = "ok", ""
        except Mismatch as mismatch:
            where = next((f"{pathlib.Path(it.filename).name} line {it.lineno}" for it in reversed(traceback.extract_tb(mismatch.__traceback__))
                          if it.filename in (scenarios.__file__, encryption.__file__)), "?")
            outcome, why = "FAILED", f"{where}: {mismatch}"
        except Exception as error:  # noqa: BLE001 - a mistake in a scenario fails that case and no other
            outcome, why = "FAILED", "".join(traceback.format_exception(error))
        with self.lock:
            print(f"{outcome:<9}{stage.label:<46}{time.monotonic() - begun:6.1f} s  {why}".rstrip(), flush=True)
            if outcome == "ok":
                self.passed += 1
            else:
                self.failed.append(stage.label)
                for server in self.servers if self.log_lines else ():
                    print(f"--- log of {server}\n{server.tail(self.log_lines, marks[server])}\n---", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose line matches")
    parser.add_argument("--versions", help="only these room versions, with commas between")
    parser.add_argument("--full", action="store_true", help="every scenario in every room version")
    parser.add_argument("--pair", default="synapse,aqueduct", help="the kinds of the two servers")
    parser.add_argument("--jobs", type=int, default=4, help="cases played at once")
    parser.add_argument("--logs", type=int, default=0, metavar="LINES", help="last lines of logs to print with a failure")
    parser.add_argument("--list", action="store_true", help="name the cases, of every version of the specification")
    parser.add_argument("--keep", action="store_true", help="leave the servers' directories for looking into")
    options = parser.parse_args()
    kinds = options.pair.split(",")
    labels = [kinds[0], kinds[1] if kinds[1] != kinds[0] else f"{kinds[1]}-2"]

    if options.list:
        class Named(str):
            kind = property(str)

        for stage in cases([Named(it) for it in labels], [str(it) for it in range(1, 13)], options.full):
            if re.search(options.only, stage.label):
                print(stage.label)
        return 0

    dir = pathlib.Path(tempfile.mkdtemp(prefix="aqueduct-interop-"))
    authority = Authority(dir)
    servers = [KINDS[kind](label, f"127.0.0.{number}", dir, authority)
               for number, (kind, label) in enumerate(zip(kinds, labels), 1)]
    report = Report(servers, options.logs)
    problems = []
    try:
        with concurrent.futures.ThreadPoolExecutor() as starting:
            list(starting.map(lambda server: server.start(), servers))
        versions = set(room_versions(servers[0])) & set(room_versions(servers[1]))
        if options.versions:
            versions &= set(options.versions.split(","))
        chosen = [stage for stage in cases(servers, versions, options.full) if re.search(options.only, stage.label)]
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as playing:
            list(playing.map(report.play, [stage for stage in chosen if not stage.scenario.is_alone]))
        for stage in chosen:
            if stage.scenario.is_alone:
                report.play(stage)
                for server in servers:
                    server.recover()
        if not chosen:
            problems.append("no case matches")
    finally:
        for server in servers:
            try:
                server.stop()
            except (RuntimeError, OSError) as error:
                problems.append(str(error))
            with contextlib.suppress(OSError):
                server.kill()
            problems += [f"{server} panicked: {line}" for line in server.panics()]
        if options.keep:
            print(f"kept: {dir}")
        else:
            shutil.rmtree(dir, ignore_errors=True)
    print(f"{report.passed} ok, {len(report.failed)} failed")
    for line in report.failed:
        print(f"  failed: {line}")
    for problem in problems:
        print(f"  {problem}")
    return 1 if report.failed or problems else 0


if __name__ == "__main__":
    sys.exit(main())
