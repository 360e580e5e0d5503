"""A person with many rooms follows sliding sync (MSC4186) with a real client, through a server that is killed on the way.

    slide.py path/to/aqueduct js=COMMAND rust=COMMAND ..

Starts a server of its own for each client, and plays the scenario of `play`. A client is a process that is driven by lines of JSON, as
those of talk.py are; it tells a whole view of what it shows whenever that changes:

    {"view": {"count": rooms of the list, "rooms": [ids, the newest first], "invites": [ids], "unread": {id: [notifications, highlights]},
              "said": {id of an opened room: [bodies, the oldest first]}, "topics": {id: topic}}}

Fails on the first thing that the client does not show in time.
"""

import asyncio
import json
import signal
import sys
import tempfile
import time

from driven import Mismatch, Person
from served import SECONDS_MAX, Account, Server

ROOMS = 33


class Client(Person):
    """The client under test: what it is told to do, and what it shows."""

    seconds_max = SECONDS_MAX

    def __init__(self):
        super().__init__("the client")
        self.view, self.problem = {}, None

    async def take(self, line):
        if "view" not in line and "broken" not in line:
            return await super().take(line)
        async with self.news:
            self.view = line.get("view", self.view)
            self.problem = line.get("broken", self.problem)
            self.news.notify_all()

    async def shows(self, what, holds):
        """Waits until the view is as it must be."""

        def is_so():
            if self.problem:
                raise Mismatch(f"the client broke: {self.problem}")
            try:
                return holds(self.view)
            except (KeyError, IndexError):
                return False

        async with self.news:
            try:
                await asyncio.wait_for(self.news.wait_for(is_so), SECONDS_MAX)
            except TimeoutError:
                raise Mismatch(f"{what}: the client shows {json.dumps(self.view, indent=1)}") from None

    async def stop(self):
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            raise Mismatch("the client did not end by itself") from None


async def play(server, client, command):
    user, friend = await Account.register(server, "user"), await Account.register(server, "friend")
    rooms = [await user.create(name=f"room {number}", preset="public_chat") for number in range(ROOMS)]
    old, older = rooms[1], rooms[2]
    for room in (old, older):
        await friend.do("POST", f"v3/join/{room}")
    await user.do("PUT", f"v3/rooms/{older}/state/m.room.topic/", {"topic": "what it is about"})
    said = [f"message {number}" for number in range(25)]
    for body in said:
        await friend.say(older, body)
    await user.say(rooms[-1], "newer than all")

    await client.start(command, server.url)
    await client.do("login", user="user", password="password")
    await client.shows("the list's first rooms", lambda view: view["count"] == ROOMS and len(view["rooms"]) >= 30)
    await client.do("grow")
    await client.shows("all rooms", lambda view: len(view["rooms"]) == ROOMS)
    await client.shows("the newest rooms first", lambda view: view["rooms"][:2] == [rooms[-1], older])
    await client.shows("what is unread", lambda view: view["unread"][older] == [25, 0] and view["unread"][old] == [0, 0])

    await friend.say(old, "up")
    await client.shows("a room that moves up", lambda view: view["rooms"][0] == old and view["unread"][old] == [1, 0])

    await client.do("open", room=older)
    await client.shows("the timeline and state of a room that is opened", lambda view: view["said"][older][-20:] == said[-20:] and view["topics"][older] == "what it is about")
    last = await friend.say(older, "hey", **{"m.mentions": {"user_ids": [user.user]}})
    await client.shows("a mention", lambda view: view["said"][older][-1] == "hey" and view["unread"][older] == [26, 1])
    await user.do("POST", f"v3/rooms/{older}/receipt/m.read/{last}", {})
    await client.shows("that everything is read", lambda view: view["unread"][older] == [0, 0])
    await user.do("PUT", f"v3/rooms/{older}/state/m.room.topic/", {"topic": "another"})
    await client.shows("another topic", lambda view: view["topics"][older] == "another")

    invited = await friend.create(name="invited", preset="private_chat", invite=[user.user])
    await client.shows("an invitation", lambda view: view["invites"] == [invited])
    await client.do("accept", room=invited)
    await friend.say(invited, "welcome")
    await client.shows("the room that was accepted", lambda view: view["rooms"][0] == invited and not view["invites"])

    thread = f"unstable/io.element.msc4306/rooms/{older}/thread/{last}/subscription"
    await user.do("PUT", thread, {})
    for _ in range(SECONDS_MAX * 10):
        if (known := await client.do("thread", room=older, root=last)) is not None:
            break
        await asyncio.sleep(0.1)
    if known is None:
        raise Mismatch("the client was not told of a subscription to a thread")

    await server.end(signal.SIGKILL)
    await server.start()
    await friend.say(older, "after the fall")
    await client.shows("a message after the server was killed", lambda view: view["rooms"][0] == older and view["said"][older][-1] == "after the fall")
    await friend.say(old, "and on")
    await client.shows("the list goes on", lambda view: view["rooms"][:2] == [old, older] and view["count"] == ROOMS + 1)
    await client.stop()


async def main(binary, clients):
    for client in clients:
        name, command = client.split("=", 1)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            server, client = Server(binary, directory), Client()
            try:
                await server.start()
                await play(server, client, command)
                if (code := await server.end(signal.SIGTERM)) != 0:
                    raise Mismatch(f"the server ended with {code}")
                if "panicked" in server.log():
                    raise Mismatch("the server panicked")
            except Mismatch as mismatch:
                print("\n".join(server.log().splitlines()[-40:]), file=sys.stderr)
                print(f"sliding sync with {name}: {mismatch}", file=sys.stderr)
                return 1
            finally:
                for process in (server, client):
                    process = getattr(process, "process", None)
                    if process and process.returncode is None:
                        process.kill()
                        await process.wait()
        print(f"sliding sync with {name}: well, in {time.monotonic() - began:.1f} s")
    return 0


sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2:])))
