"""What is played by people whose clients encrypt. In each scene everybody who should read a message must decrypt it."""

import asyncio
from collections import namedtuple

from stage import Mismatch, all_read, all_talk, come_in, equal, room_of, say, until

KINDS = ("js", "nio", "mautrix")
Scene = namedtuple("Scene", "play kind servers_min is_alone")
SCENES = []


def scene(servers=1, kinds=(None,), alone=False):
    """A scene that needs so many servers, is played once with each of the kinds, and beside others unless it is to be alone."""

    def add(function):
        SCENES.extend(Scene(function, kind, servers, alone) for kind in kinds)
        return function

    return add


@scene(kinds=KINDS)
async def conversation(stage, kind):
    """Somebody makes a room of three; later others come, and read what is said from then on."""
    ada, ben, cleo, dora = await stage.people(kind, *(it for it in KINDS if it != kind), "js")
    room = await room_of(ada, ben, cleo)
    await all_talk(room, [ada, ben, cleo])
    await ada.do("invite", room=room, user=dora.user)
    await come_in(dora, room, [ada, ben, cleo])
    await all_talk(room, [ada, ben, cleo, dora])
    await ben.do("leave", room=room)
    await asyncio.gather(*(it.sees("member", room=room, user=ben.user, membership="leave") for it in (ada, cleo, dora)))
    await all_talk(room, [ada, cleo, dora])


@scene()
async def invited(stage, _):
    """What is said to somebody who is only invited is there to read after the join."""
    ada, ben = await stage.people("js", "js")
    # Nobody is told of new devices of somebody who is only invited, so the device must be there before.
    stranger = await stage.stranger(stage.there)
    await until("ben has keys", lambda: stranger.asks_keys(ben), lambda devices: devices == [ben.device])
    room = (await ada.do("create_room", name="sealed", encrypted=True, invite=[ben.user]))["room"]
    await ben.sees("mine", room=room, membership="invite")
    await ada.knows([ada, ben])
    event = (await ada.do("send", room=room, body="come in"))["event"]
    await ben.do("join", room=room)
    await ben.sees("mine", room=room, membership="join")
    await ben.do("scroll_back", room=room)
    await all_read(ada, room, event, "come in", [ada, ben])


@scene()
async def new_devices(stage, _):
    """People log in elsewhere, too, and read on both devices what comes then."""
    ada, ben, cleo = devices = await stage.people(*KINDS)
    room = await room_of(*devices)
    await all_talk(room, devices)
    for of, kind in (ada, "mautrix"), (ben, "js"), (cleo, "nio"):
        new = await stage.another_device(of, kind)
        await new.sees("mine", room=room, membership="join")
        devices.append(new)
        await all_talk(room, devices)


@scene()
async def verification(stage, _):
    """Two verify each other; what they know then holds for their further devices, and others see signed devices as signed."""
    ada, ben, cleo = await stage.people("js", "js", "mautrix")
    room = await room_of(ada, ben, cleo)
    await all_talk(room, [ada, ben, cleo])
    for friend in ada, ben:
        await friend.do("sign_devices", password=friend.password)
    for friend, other in (ada, ben), (ben, ada):
        await friend.has("the other has keys for cross-signing", bool, "has_identity", user=other.user)
    await compare(ada, ben, user=ben.user, room=room)
    for friend, other in (ada, ben), (ben, ada):
        await friend.has(f"{other.label} is verified", bool, "is_verified", user=other.user)
        await signed(friend, other, by_owner=True, by_me=True)

    new = await stage.another_device(ada, "js")
    await new.sees("mine", room=room, membership="join")
    await all_talk(room, [ada, ben, cleo, new])
    await signed(ben, new, by_owner=False, by_me=False)
    await compare(new, ada)
    await signed(ben, new, by_owner=True, by_me=True)
    await new.has(f"{ben.label} is verified", bool, "is_verified", user=ben.user)
    await signed(new, ben, by_owner=True, by_me=True)
    for device in ada, ben, new:
        await cleo.has(f"{device.label} is signed", lambda it: it == "cross-signed-tofu", "trust", user=device.user, device=device.device)

    await cleo.do("sign_devices", password=cleo.password)
    for friend in ada, ben, new:
        await signed(friend, cleo, by_owner=True, by_me=False)
    await all_talk(room, [ada, ben, cleo, new])


async def compare(one, other, **whom):
    """One asks the other to verify, and both find that they see the same."""
    await one.do("verify", **{"user": None, "room": None, **whom})
    strings = [(await it.sees("strings"))["strings"] for it in (one, other)]
    equal("the strings that are compared", strings[0], strings[1])
    # One after the other: a client that hears of a confirmation while it sends its own may send the end before it, which ends it too early.
    await one.do("strings_match")
    await other.sees("confirmed")
    await other.do("strings_match")
    for friend in one, other:
        await friend.sees("verified")


async def signed(friend, device, **wanted):
    await friend.has(f"{device.label} is {wanted}", lambda it: it == wanted, "is_device_verified", user=device.user, device=device.device)


@scene()
async def backup(stage, _):
    """A new device reads with the recovery key what was said before it was there, when no other device is left to ask."""
    ada, ben = await stage.people("js", "nio")
    room = await room_of(ada, ben)
    await ada.do("sign_devices", password=ada.password)
    recovery_key = (await ada.do("back_up"))["recovery_key"]
    told = []
    for speaker in (ada, ben) * 3:
        await speaker.do("rotate", room=room)
        await speaker.knows([ada, ben])
        body = f"{len(told)}: kept"
        event = (await speaker.do("send", room=room, body=body))["event"]
        await all_read(speaker, room, event, body, [ada, ben])
        told.append((speaker, room, event, body))
    await ada.has("all keys are saved", lambda it: it["saved"] == it["known"] == len(told), "backup")
    await ada.do("logout")

    new = await stage.another_device(ada, "js")
    for _, _, event, _ in told:
        await new.sees("undecrypted", room=room, event=event)
    equal("the keys that came back", await new.do("recover", recovery_key=recovery_key), {"total": len(told), "imported": len(told)})
    for speaker, room, event, body in told:
        await all_read(speaker, room, event, body, [new])
    await signed(new, new, by_owner=True, by_me=True)
    await all_talk(room, [new, ben])

    other = await stage.another_device(ada, "mautrix")
    await all_talk(room, [new, ben, other])
    await other.do("recover", recovery_key=recovery_key)
    await signed(new, other, by_owner=True, by_me=True)


@scene()
async def logout(stage, _):
    """A device that is logged out is gone for all, and nobody encrypts for it any more."""
    ada, ben, cleo = devices = await stage.people(*KINDS)
    other = await stage.another_device(ben, "js")
    room = await room_of(*devices)
    await other.sees("mine", room=room, membership="join")
    await all_talk(room, [*devices, other])
    for speaker in devices:
        if [ben.user, other.device] not in await speaker.do("shared_with", room=room):
            raise Mismatch(f"{speaker.label} told no key to {other.label}, which could read")
    await other.do("logout")
    await all_talk(room, devices)
    for speaker in devices:
        if [ben.user, other.device] in await speaker.do("shared_with", room=room):
            raise Mismatch(f"{speaker.label} told a key to {other.label}, which is logged out")
    for server in stage.servers:
        told = await (await stage.stranger(server)).asks_keys(ben)
        equal("devices of somebody who logged one out", told, [ben.device])


@scene(servers=2, alone=True)
async def partition(stage, _):
    """Servers lose each other while keys are shared. Nothing is lost by it, and nothing comes twice."""
    ada, ben, cleo, dora = devices = await stage.people(*KINDS, "js")
    room = await room_of(*devices)
    await all_talk(room, devices)
    for is_cut in True, False:
        # Either nobody gets through in either direction, or one server stands still with its clients, and accepts connections.
        if is_cut:
            for server in stage.servers:
                server.gate.cut()
        else:
            stage.there.freeze()
        said = []
        for speaker in devices:
            if is_cut or speaker.server is stage.here:
                await speaker.do("rotate", room=room)
                event = (await speaker.do("send", room=room, body="are you there?"))["event"]
                near = [it for it in devices if it.server is speaker.server]
                await all_read(speaker, room, event, "are you there?", near)
                said.append((speaker, room, event, "are you there?", [it for it in devices if it not in near]))
        new = await stage.another_device(dora if is_cut else ada, "mautrix")
        await new.sees("mine", room=room, membership="join")
        for server in stage.servers:
            server.recover()
        for missed in said:
            await all_read(*missed)
        devices.append(new)
        await all_talk(room, devices)


@scene(kinds=KINDS, alone=True)
async def crash(stage, kind):
    """Each server is killed between the claim of keys and the message for which they were claimed."""
    for server in dict.fromkeys(stage.servers):
        ada, ben = await stage.people(kind, "js")
        room = await room_of(ada, ben)
        await ada.knows([ada, ben])
        await ada.do("pause")
        sending = asyncio.create_task(ada.do("send", room=room, body="through the fall"))
        claimed = await ada.sees("claimed")
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await ada.do("go_on")
        await all_read(ada, room, (await sending)["event"], "through the fall", [ada, ben])
        await say(ben, room, [ada, ben])
        stranger = await stage.stranger(ben.server)
        given = {key for _, _, key in claimed["keys"]}
        for _ in range(5):
            given.update(await stranger.claims(ben))
        equal("the number of different keys that were given", len(given), 6)


@scene()
async def keys_run_out(stage, _):
    """Nobody can be kept from encrypting for a device by taking all of its one-time keys while it is away."""
    near, away, *far = await stage.people("js", "js", "nio", "mautrix")
    others = [near, *far]
    rooms = [await room_of(friend, away) for friend in others]
    for friend in others:
        await friend.knows([friend, away])
    stranger = await stage.stranger(stage.here)
    away.freeze()
    taken = []
    while len(taken) < 200:
        [(key, content)] = (await stranger.claims(away)).items()
        if content.get("fallback"):
            break
        taken.append(key)
    equal("one-time keys that were given", len(taken), len(set(taken)))
    equal("whether a fallback key follows", content.get("fallback"), True)
    said = []
    for friend, room in zip(others, rooms):
        event = (await friend.do("send", room=room, body="you have no keys left"))["event"]
        said.append((friend, room, event, "you have no keys left", [friend, away]))
    away.thaw()
    for message in said:
        await all_read(*message)
    for friend, room in zip(others, rooms):
        await say(away, room, [friend, away])
    await away.has("it has new keys", bool, "knows", users=[away.user])
    [content] = (await stranger.claims(away)).values()
    equal("whether a new key is a fallback key", content.get("fallback", False), False)
