"""Push rules and pushers: what a client sets, and what a local gateway is told because of it."""

import asyncio
import signal

from driven import Mismatch, equal
from served import Account

# The words of the rule of which each message here has one, so that it is a highlight.
WORD = "lemon"


def pusher(gateway, key, **data):
    return {
        "kind": "http", "app_id": "org.example.app", "pushkey": key, "app_display_name": "An app", "device_display_name": "A device",
        "lang": "en", "data": {"url": f"{gateway.url}/_matrix/push/v1/notify", **data},
    }


def about(event):
    return lambda notification: notification.get("event_id") == event


async def play(stage, server, gateway, until):
    alice = await stage.person("js", server)
    bob, carol = await Account.register(server, "bob"), await Account.register(server, "carol")
    room = (await alice.do("create_room", name="The orchard", invite=[bob.user, carol.user]))["room"]
    await alice.sees("mine", room=room, membership="join")
    for account in bob, carol:
        await account.do("POST", f"v3/join/{room}", {})
        await alice.sees("member", room=room, user=account.user, membership="join")
    for key, data in ("phone", {"brand": "x"}), ("watch", {"format": "event_id_only"}):
        await alice.do("set_pusher", pusher=pusher(gateway, key, **data))
    listed = {it["pushkey"]: it for it in await alice.do("pushers")}
    equal("the pushers", {key: it["data"]["url"] for key, it in listed.items()}, dict.fromkeys(
        ("phone", "watch"), f"{gateway.url}/_matrix/push/v1/notify"))

    await tell(gateway, alice, bob, room)
    said = await rule(gateway, alice, bob, room, until)
    await list_notifications(gateway, alice, bob, room, said)
    await mute(gateway, alice, bob, room)
    await survive(server, gateway, alice, bob, room, until)
    await reject(gateway, alice, bob, room, until)
    await log_out(gateway, alice, bob, carol, room)


async def tell(gateway, alice, bob, room):
    """A message is told with its content, and to a device that asks for no more with its id."""
    event = await bob.say(room, "hello")
    told = await gateway.takes("phone", "a message", about(event))
    equal("who and what the gateway is told", [told.get(it) for it in ("type", "room_id", "sender", "sender_display_name", "room_name")], [
        "m.room.message", room, bob.user, "bob", "The orchard"])
    equal("the content", told["content"], {"msgtype": "m.text", "body": "hello"})
    equal("the counts", told["counts"], {"unread": 1})
    [device] = told["devices"]
    equal("the device", [device["app_id"], device["data"], device["tweaks"]], ["org.example.app", {"brand": "x"}, {}])
    told = await gateway.takes("watch", "an id", about(event))
    equal("what a device is told that wants ids", sorted(told), ["counts", "devices", "event_id", "prio", "room_id"])
    await alice.sees("message", room=room, sender=bob.user, event=event)
    await alice.do("read", room=room, event=event)
    for key in "phone", "watch":
        await gateway.takes(key, "that everything is read", lambda it: it.get("counts") == {"unread": 0} and "event_id" not in it)
    # Nobody is told of what they say themselves.
    await alice.do("send", room=room, body="my own")
    event = await bob.say(room, "and again")
    for key in "phone", "watch":
        await gateway.takes(key, "the next message of another", about(event))


async def rule(gateway, alice, bob, room, until):
    """A rule for a word counts while it is there and on, here, for the gateway and for the client itself. Gives all messages with the word."""
    actions = ["notify", {"set_tweak": "highlight"}, {"set_tweak": "sound", "value": "bells.ogg"}]
    await alice.do("add_rule", kind="content", rule="word", body={"pattern": WORD, "actions": actions})
    kept = await alice.do("rule", kind="content", rule="word")
    equal("the rule", [kept.get(it) for it in ("pattern", "enabled", "default")], [WORD, True, False])
    await until("the client knows the rule", lambda: alice.do("rule_known", kind="content", rule="word"), bool)
    said = []
    for number in range(3):
        event = await bob.say(room, f"A {WORD.upper()}, please, {number}")
        told = await gateway.takes("phone", "a highlight", about(event))
        equal("the tweaks", told["devices"][0]["tweaks"], {"highlight": True, "sound": "bells.ogg"})
        equal("the urgency", told["prio"], "high")
        said.append(event)
    await alice.sees("message", room=room, sender=bob.user, event=event)
    judged = await alice.do("judged", room=room, event=event)
    equal("what the client makes of it", [judged["notify"], judged["tweaks"]], [True, {"highlight": True, "sound": "bells.ogg"}])
    await until("three highlights are unread", lambda: alice.do("unread", room=room), lambda it: it[1] == 3)

    await alice.do("enable_rule", kind="content", rule="word", on=False)
    event = await bob.say(room, f"{WORD} without a rule")
    said.append(event)
    told = await gateway.takes("phone", "a message by the rule of all", about(event))
    equal("the tweaks without the rule", told["devices"][0]["tweaks"], {})
    await alice.do("enable_rule", kind="content", rule="word", on=True)
    await alice.do("set_actions", kind="content", rule="word", actions=[])
    said.append(await bob.say(room, f"{WORD} that nobody wants"))
    event = await bob.say(room, "something else")
    await gateway.takes("phone", "what comes after a message that a rule keeps quiet", about(event))
    await alice.do("set_actions", kind="content", rule="word", actions=actions)
    event = await bob.say(room, f"one more {WORD}")
    told = await gateway.takes("phone", "a highlight again", about(event))
    equal("the tweaks again", told["devices"][0]["tweaks"], {"highlight": True, "sound": "bells.ogg"})
    return [*said, event]


async def mute(gateway, alice, bob, room):
    """A room can be kept quiet, and everything."""
    await alice.do("add_rule", kind="room", rule=room, body={"actions": []})
    await bob.say(room, "in a quiet room")
    await alice.do("delete_rule", kind="room", rule=room)
    event = await bob.say(room, "aloud")
    await gateway.takes("phone", "what comes after a quiet room", about(event))
    await alice.do("enable_rule", kind="override", rule=".m.rule.master", on=True)
    await bob.say(room, "to nobody")
    await alice.do("enable_rule", kind="override", rule=".m.rule.master", on=False)
    event = await bob.say(room, "to everybody")
    await gateway.takes("phone", "what comes after silence", about(event))


async def list_notifications(gateway, alice, bob, room, said):
    """The list of what notifies the user, by the rules of now, has pages, and knows what is read."""
    equal("the highlights", await alice.do("highlights"), [*reversed(said)])
    page = await alice.do("notifications", query={"limit": "3"})
    equal("a page", [(it["room_id"], it["event"]["content"]["body"], it["read"]) for it in page["notifications"]], [
        (room, f"one more {WORD}", False), (room, "something else", False), (room, f"{WORD} that nobody wants", False)])
    seen = [it["event"]["event_id"] for it in page["notifications"]]
    while "next_token" in page:
        page = await alice.do("notifications", query={"limit": "3", "from": page["next_token"]})
        seen += [it["event"]["event_id"] for it in page["notifications"]]
    if len(seen) != len(set(seen)) or not set(said) < set(seen):
        raise Mismatch(f"the pages have something twice, or not all highlights: {seen}, {said}")
    last = await bob.say(room, "the last")
    await gateway.takes("phone", "the last message", about(last))
    await alice.sees("message", room=room, sender=bob.user, event=last)
    await alice.do("read", room=room, event=last)
    page = await alice.do("notifications", query={"limit": "100"})
    equal("what is not read", [it["event"]["event_id"] for it in page["notifications"] if not it["read"]], [])
    await gateway.takes("phone", "that everything is read", lambda it: it.get("counts") == {"unread": 0} and "event_id" not in it)
    await alice.do("delete_rule", kind="content", rule="word")
    equal("a rule that was deleted", await alice.do("rule", kind="content", rule="word"), None)
    await alice.refused("M_NOT_FOUND", "enable_rule", kind="content", rule="word", on=True)


async def survive(server, gateway, alice, bob, room, until):
    """A gateway that is away for a while, and a server that is killed meanwhile: afterwards the newest message is told, once."""
    gateway.taken.clear()
    gateway.is_down = True
    events = [await bob.say(room, f"message {number} of an outage") for number in range(3)]
    await gateway.refuses("a message of an outage", lambda it: it.get("event_id") in events)
    await server.end(signal.SIGKILL)
    await server.start()
    events.append(await bob.say(room, "after the fall"))
    gateway.is_down = False
    await gateway.takes("phone", "the newest message after an outage", about(events[-1]), 40)
    event = await bob.say(room, "as ever")
    await gateway.takes("phone", "the message after it", about(event))


async def reject(gateway, alice, bob, room, until):
    """A pusher of which the gateway knows nothing any more goes."""
    gateway.rejected = ["watch"]
    await bob.say(room, "who is there?")
    await until("the rejected pusher is gone", lambda: alice.do("pushers"), lambda it: [one["pushkey"] for one in it] == ["phone"])
    gateway.rejected = []


async def log_out(gateway, alice, bob, carol, room):
    """Nothing is told of a session that has ended."""
    await carol.do("POST", "v3/pushers/set", pusher(gateway, "other"))
    await alice.do("logout")
    gateway.taken.clear()
    event = await bob.say(room, "to whoever is left")
    await gateway.takes("other", "a message to another user", about(event))
    await asyncio.sleep(1)
    equal("what the gateway is told for a session that ended", [it.get("event_id") for it in gateway.of("phone")], [])
