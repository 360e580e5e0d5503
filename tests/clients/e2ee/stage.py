"""The servers of a run, and people on them whose real clients encrypt."""

import asyncio
import pathlib
import secrets
import signal
import sys
import time

CLIENTS = pathlib.Path(__file__).parent.parent
sys.path[1:1] = [str(CLIENTS), str(CLIENTS.parent / "interop")]

import people
from driven import Mismatch, Person, equal

SECONDS_MAX = 60 * people.PATIENCE


class Friend(Person):
    """One device of a user, with a client of some kind."""

    seconds_max = SECONDS_MAX

    def __init__(self, stage, kind, server):
        super().__init__(f"{kind} on {server}")
        self.stage, self.kind, self.server = stage, kind, server

    async def log_in(self, name, password):
        self.name, self.password = name, password
        answer = await self.do("login", user=name, password=password)
        self.user, self.device = answer["user"], answer["device"]
        self.label = f"{self.user} {self.device} ({self.kind})"

    async def has(self, what, holds, verb, **details):
        """Asks until the answer is as it must be."""
        await until(f"{self.label} tells that {what}", lambda: self.do(verb, **details), holds)

    async def knows(self, devices):
        """Waits until the client would encrypt for exactly these devices, and for its user's own."""
        wanted = {it.user: sorted(one.device for one in devices if one.user == it.user and one is not self) for it in devices}
        await self.has(f"it knows exactly {wanted}", lambda known: known == wanted, "knows", users=list(wanted))

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def was_given_once(self):
        """No encrypted message to this device may have come twice."""
        hashes = [sight["hash"] for sight in self.seen if sight["kind"] == "to_device"]
        if len(hashes) != len(set(hashes)):
            raise Mismatch(f"{self.label}: a message to this device came twice")


class Stranger(people.Person):
    """An account that asks by plain HTTP, for what no client would ask."""

    async def asks_keys(self, friend):
        """The devices of a user that a server tells."""
        answer = await asyncio.to_thread(self.call, "POST", "/keys/query", {"device_keys": {friend.user: []}})
        return list(answer["device_keys"][friend.user])

    async def claims(self, friend):
        """The key that is given for a device: its content by its id."""
        wanted = {friend.user: {friend.device: "signed_curve25519"}}
        answer = await asyncio.to_thread(self.call, "POST", "/keys/claim", {"one_time_keys": wanted})
        return answer["one_time_keys"][friend.user][friend.device]


class Stage:
    """What one scene plays on. `here` and `there` are one and the same where there is only one server."""

    def __init__(self, servers, commands):
        self.servers, self.commands = servers, commands
        self.here, self.there = servers[0], servers[-1]
        self.friends = []

    async def device(self, kind, server, name, password):
        friend = Friend(self, kind, server)
        await friend.start(self.commands[kind], server.url)
        self.friends.append(friend)
        if name is None:
            name, password = f"{kind}-{secrets.token_hex(4)}", secrets.token_hex(8)
            await friend.do("register", user=name, password=password)
        await friend.log_in(name, password)
        return friend

    async def people(self, *kinds):
        """People with accounts of their own: the first on the server here, the next on the one there, and so on."""
        servers = (self.here, self.there) * len(kinds)
        return await asyncio.gather(*(self.device(kind, server, None, None) for kind, server in zip(kinds, servers)))

    async def another_device(self, of, kind):
        return await self.device(kind, of.server, of.name, of.password)

    async def stranger(self, server):
        return await asyncio.to_thread(Stranger, server, "stranger")

    async def close(self):
        for friend in self.friends:
            if friend.process.returncode is None:
                friend.thaw()
        await asyncio.gather(*(friend.stop() for friend in self.friends))


async def until(what, ask, holds):
    """Asks until the answer is as it must be."""
    end = time.monotonic() + SECONDS_MAX
    while not holds(answer := await ask()):
        if time.monotonic() > end:
            raise Mismatch(f"within {SECONDS_MAX} s it was not so that {what}: {answer}")
        await asyncio.sleep(0.1)


async def room_of(creator, *invited):
    """An encrypted room that everybody has joined."""
    room = (await creator.do("create_room", name="sealed", encrypted=True, invite=[it.user for it in invited]))["room"]
    await creator.sees("mine", room=room, membership="join")
    here = [creator]
    for friend in invited:
        await come_in(friend, room, here)
        here.append(friend)
    return room


async def come_in(friend, room, here):
    await friend.sees("mine", room=room, membership="invite")
    await friend.do("join", room=room)
    await friend.sees("mine", room=room, membership="join")
    await asyncio.gather(*(it.sees("member", room=room, user=friend.user, membership="join") for it in here))


async def say(speaker, room, readers, body=None):
    """Sends a message that each of the readers must decrypt."""
    body = body or f"from {speaker.label}: {secrets.token_hex(4)}"
    event = (await speaker.do("send", room=room, body=body))["event"]
    await all_read(speaker, room, event, body, readers)


async def all_read(speaker, room, event, body, readers):
    await asyncio.gather(*(
        it.sees("message", room=room, sender=speaker.user, event=event, body=body, encrypted=True) for it in readers))


async def all_talk(room, devices):
    """Each says something, once it knows of all others, and all read it."""
    for speaker in devices:
        await speaker.knows(devices)
        await say(speaker, room, devices)
