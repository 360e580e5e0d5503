"""Two people, each with a real client, hold a conversation through a running server.

    talk.py http://localhost:8008 nio=COMMAND js=COMMAND ..

Every pairing of the given clients plays the same scenario; a person is a process that is driven by lines of JSON
(obey.py says how). Fails on the first thing that one of them does not see as the other did it.
"""

import asyncio
import secrets
import sys
import time

from driven import Mismatch, Person, equal


async def talk(alice, bob):
    for person, name in (alice, "alice"), (bob, "bob"):
        user, password = f"{name}-{secrets.token_hex(4)}", secrets.token_hex(8)
        await person.do("register", user=user, password=password)
        person.user = (await person.do("login", user=user, password=password))["user"]

    room = await meet(alice, bob)
    await converse(alice, bob, room)
    await decorate(alice, bob, room)
    await part(alice, bob, room)
    for person in alice, bob:
        await person.do("logout")


async def meet(alice, bob):
    room = (await alice.do("create_room", name="The well"))["room"]
    await alice.sees("mine", room=room, membership="join")
    await alice.sees("name", room=room, name="The well")
    await bob.refused("M_FORBIDDEN", "join", room=room)
    await alice.do("invite", room=room, user=bob.user)
    await bob.sees("mine", room=room, membership="invite", sender=alice.user)
    await alice.sees("member", room=room, user=bob.user, membership="invite")
    await bob.do("join", room=room)
    await bob.sees("mine", room=room, membership="join", sender=bob.user)
    await alice.sees("member", room=room, user=bob.user, membership="join")
    equal("members", (await bob.do("members", room=room))["users"], sorted([alice.user, bob.user]))
    return room


async def converse(alice, bob, room):
    for speaker, listener in (alice, bob), (bob, alice):
        for number in range(5):
            body = f"{number}: says {speaker.label} \N{SLIGHTLY SMILING FACE}"
            await listener_hears(speaker, listener, room, body)

    await alice.do("typing", room=room, on=True)
    await bob.sees("typing", room=room, users=[alice.user])
    await alice.do("typing", room=room, on=False)
    await bob.sees("typing", room=room, users=[])
    await bob.do("typing", room=room, on=True)
    await alice.sees("typing", room=room, users=[bob.user])
    event = await listener_hears(bob, alice, room, "done typing")
    await alice.do("read", room=room, event=event)
    await bob.sees("receipt", room=room, user=alice.user, event=event)
    event = await listener_hears(alice, bob, room, "your turn to read")
    await bob.do("read", room=room, event=event)
    await alice.sees("receipt", room=room, user=bob.user, event=event)


async def listener_hears(speaker, listener, room, body):
    """Both see the message, under one event id."""
    event = (await speaker.do("send", room=room, body=body))["event"]
    for person in listener, speaker:
        await person.sees("message", room=room, sender=speaker.user, event=event, body=body)
    return event


async def decorate(alice, bob, room):
    for one, other in (alice, bob), (bob, alice):
        event = await listener_hears(one, other, room, "wirter")
        await one.do("edit", room=room, event=event, body="winter")
        await other.sees("edit", room=room, sender=one.user, of=event, body="winter")
        reaction = (await other.do("react", room=room, event=event, key="\N{SNOWMAN WITHOUT SNOW}"))["event"]
        await one.sees("reaction", room=room, sender=other.user, to=event, key="\N{SNOWMAN WITHOUT SNOW}")
        await other.do("redact", room=room, event=reaction)
        await one.sees("redaction", room=room, sender=other.user, of=reaction)
        await one.do("redact", room=room, event=event)
        await other.sees("redaction", room=room, sender=one.user, of=event)

    await alice.do("set_name", room=room, name="The cistern")
    await bob.sees("name", room=room, name="The cistern")
    await alice.do("set_topic", room=room, topic="Water, and what carries it")
    await bob.sees("topic", room=room, topic="Water, and what carries it")
    await bob.refused("M_FORBIDDEN", "set_name", room=room, name="Bob's")

    history = (await bob.do("history", room=room))["bodies"]
    for speaker in alice, bob:
        said = [body for body in history if f"says {speaker.label}" in body]
        equal(f"what {speaker.label} said", [body[0] for body in said], list("01234"))
    equal("redacted messages in the history", [b for b in history if b == "wirter"], [])


async def part(alice, bob, room):
    await bob.refused("M_FORBIDDEN", "kick", room=room, user=alice.user, reason="no power")
    await alice.do("kick", room=room, user=bob.user, reason="out")
    await bob.sees("mine", room=room, membership="leave", sender=alice.user)
    await alice.sees("member", room=room, user=bob.user, membership="leave")
    await bob.refused("M_FORBIDDEN", "send", room=room, body="heard?")
    await bob.refused("M_FORBIDDEN", "join", room=room)

    await alice.do("invite", room=room, user=bob.user)
    await bob.sees("mine", room=room, membership="invite")
    await bob.do("join", room=room)
    await bob.sees("mine", room=room, membership="join")
    await listener_hears(bob, alice, room, "back again")

    await alice.do("ban", room=room, user=bob.user, reason="for good")
    await bob.sees("mine", room=room, membership="ban", sender=alice.user)
    await alice.sees("member", room=room, user=bob.user, membership="ban")
    await alice.refused("M_", "invite", room=room, user=bob.user)
    await alice.do("unban", room=room, user=bob.user)
    await alice.sees("member", room=room, user=bob.user, membership="leave")

    await alice.do("invite", room=room, user=bob.user)
    await bob.sees("mine", room=room, membership="invite")
    await bob.do("join", room=room)
    await bob.sees("mine", room=room, membership="join")
    await bob.do("leave", room=room)
    await bob.sees("mine", room=room, membership="leave", sender=bob.user)
    await alice.sees("member", room=room, user=bob.user, membership="leave", sender=bob.user)
    await bob.do("forget", room=room)
    await alice.do("leave", room=room)
    await alice.sees("mine", room=room, membership="leave", sender=alice.user)


async def main(server, *commands):
    clients = [argument.split("=", 1) for argument in commands]
    failed = False
    for alices, alices_command in clients:
        for bobs, bobs_command in clients:
            alice, bob = Person(f"alice on {alices}"), Person(f"bob on {bobs}")
            await alice.start(alices_command, server)
            await bob.start(bobs_command, server)
            began = time.monotonic()
            try:
                await talk(alice, bob)
                print(f"ok    {alice.label}, {bob.label} ({time.monotonic() - began:.1f} s)", flush=True)
            except Mismatch as mismatch:
                print(f"FAIL  {alice.label}, {bob.label}\n      {mismatch}")
                failed = True
            finally:
                await alice.stop()
                await bob.stop()
    return failed


sys.exit(asyncio.run(main(*sys.argv[1:])))
