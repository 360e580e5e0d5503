"""What two servers must get right together: each function is one scenario.

A room begins on the server `here`, its people are called alice and carol; bob and dave are of the server `there`.
"""

import concurrent.futures
import secrets
import time

from people import Mismatch, Refused, equal, eventually, quote, same_state

ALL = []
# After a cut a server may wait before it tries again: half a minute, if it does not hear from the other sooner.
RECOVERY_SECONDS_MAX = 75
# A server may keep what another one told of a user, or of its public rooms, for a while.
PROFILE_SECONDS_MAX = 75


class Scenario:
    def __init__(self, play, since, is_short, is_alone):
        self.play, self.since, self.is_short, self.is_alone = play, since, is_short, is_alone
        self.name = play.__name__

    def knows(self, version):
        return int(version) >= self.since


def scenario(since=1, short=False, alone=False):
    """Registers a scenario: the first room version that can play it, whether each version plays it, whether nothing else
    may play meanwhile."""

    def register(play):
        ALL.append(Scenario(play, since, short, alone))
        return play

    return register


def meet(stage, **options):
    """A room with alice, where bob has joined over federation."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, **options)
    if options.get("preset", "public_chat") != "public_chat":
        alice.acts("invite", room, bob)
        bob.sees_own(room, "invite")
    bob.joins(room, stage.here)
    bob.sees_own(room, "join")
    alice.sees_membership(room, bob, "join")
    return alice, bob, room


def promote(alice, room, *others, level=100):
    levels = alice.asks(room, "m.room.power_levels")
    levels.setdefault("users", {}).update({other.id: level for other in others})
    event = alice.sets(room, "m.room.power_levels", levels)
    for other in others:
        other.hears(room, event, "the new power levels")


def talk(alice, bob, room, seconds=20):
    """A message each way is heard."""
    for speaker, listener in (alice, bob), (bob, alice):
        text = f"{speaker.server} says {secrets.token_hex(4)}"
        event = listener.hears(room, speaker.sends(room, text), f"the message of {speaker}", seconds)
        equal("body", event["content"].get("body"), text)
        equal("sender", event["sender"], speaker.id)


# Rooms and what is said in them


@scenario(short=True)
def join_and_talk(stage):
    alice, bob, room = meet(stage, name="The well", topic="Water")
    for _ in range(3):
        talk(alice, bob, room)
    equal("name", bob.asks(room, "m.room.name")["name"], "The well")
    equal("version", bob.asks(room, "m.room.create").get("room_version", "1"), stage.version)
    same_state(room, alice, bob)
    members = bob.call("GET", f"/rooms/{quote(room)}/joined_members")["joined"]
    equal("members", sorted(members), sorted([alice.id, bob.id]))


@scenario(short=True)
def edits_redactions_reactions_threads(stage):
    alice, bob, room = meet(stage)
    for writer, reader in (alice, bob), (bob, alice):
        first = writer.sends(room, "first")
        reader.hears(room, first)
        edit = writer.sends(room, {
            "msgtype": "m.text", "body": "* second", "m.new_content": {"msgtype": "m.text", "body": "second"},
            "m.relates_to": {"rel_type": "m.replace", "event_id": first}})
        reader.hears(room, edit, "the edit")
        shown = reader.event(room, first)["unsigned"]["m.relations"]["m.replace"]
        equal("edit", shown["event_id"], edit)

        reaction = reader.sends(
            room, {"m.relates_to": {"rel_type": "m.annotation", "event_id": first, "key": "\N{THUMBS UP SIGN}"}}, "m.reaction")
        writer.hears(room, reaction, "the reaction")
        related = writer.call("GET", f"/_matrix/client/v1/rooms/{quote(room)}/relations/{quote(first)}/m.annotation")
        equal("reactions", [event["event_id"] for event in related["chunk"]], [reaction])

        reply = reader.sends(room, {
            "msgtype": "m.text", "body": "in a thread",
            "m.relates_to": {"rel_type": "m.thread", "event_id": first, "is_falling_back": True,
                             "m.in_reply_to": {"event_id": first}}})
        writer.hears(room, reply, "the reply")
        threads = writer.call("GET", f"/_matrix/client/v1/rooms/{quote(room)}/threads")["chunk"]
        latest = {event["event_id"]: event["unsigned"]["m.relations"]["m.thread"]["latest_event"]["event_id"] for event in threads}
        equal("latest of the thread", latest.get(first), reply)

        redaction = writer.redacts(room, first, reason="a slip")
        told = reader.hears(room, redaction, "the redaction")
        equal("what is redacted", told["content"].get("redacts") or told.get("redacts"), first)
        gone = eventually("the message is redacted", lambda: (it := reader.event(room, first))["content"] == {} and it)
        equal("the reason", gone["unsigned"]["redacted_because"]["event_id"], redaction)

    # A moderator's redaction counts everywhere, a stranger's nowhere.
    said = bob.sends(room, "to be removed")
    alice.hears(room, said)
    bob.hears(room, alice.redacts(room, said))
    eventually("alice's redaction counts", lambda: bob.event(room, said)["content"] == {})
    said = alice.sends(room, "to stay")
    bob.hears(room, said)
    bob.refused(403, "M_FORBIDDEN", "PUT", f"/rooms/{quote(room)}/redact/{quote(said)}/{secrets.token_hex(4)}", {})


@scenario(short=True)
def state_changes(stage):
    alice, bob, room = meet(stage)
    alice.sets(room, "m.room.topic", {"topic": "hers"})
    bob.sees_state(room, "m.room.topic", {"topic": "hers"})
    bob.refused(403, "M_FORBIDDEN", "PUT", f"/rooms/{quote(room)}/state/m.room.topic/", {"topic": "his"})
    promote(alice, room, bob, level=50)
    bob.sets(room, "org.example.thing", {"number": 7}, "a key/with ü")
    alice.sees_state(room, "org.example.thing", {"number": 7}, "a key/with ü")
    bob.sets(room, "m.room.topic", {"topic": "his"})
    alice.sees_state(room, "m.room.topic", {"topic": "his"})
    for person, other in (alice, bob), (bob, alice):
        person.call("PUT", f"/profile/{quote(person.id)}/displayname", {"displayname": "Renamed"})
        other.until("the new name", lambda it: (
            it.room(room).content("m.room.member", person.id) or {}).get("displayname") == "Renamed")
    same_state(room, alice, bob)


@scenario(short=True)
def odd_contents(stage):
    """What JSON can hold and clients really send comes over unchanged, and what a version forbids is refused."""
    alice, bob, room = meet(stage)
    promote(alice, room, bob, level=50)
    odd = {
        "text": "\u0000 \u007f \u2028 \ud7ff \N{GRINNING FACE} e\u0301 \\ / \" <&>", "\N{SNOWMAN}": {"": [], "a b": {}},
        "numbers": [0, -1, 2**53 - 1, -(2**53) + 1], "none": None, "lists": [[], [[]], [{"deep": [[[True, False]]]}]],
        "signatures": {"x": 1}, "hashes": [], "unsigned": 5, "event_id": "$no", "age": 7}
    for writer, reader in (alice, bob), (bob, alice):
        sent = writer.sends(room, odd, "org.example.\N{SNOWMAN}")
        equal("content", reader.hears(room, sent)["content"], odd)
        key = "\N{SNOWMAN} / ? # % \\ \""
        writer.sets(room, "org.example.odd", odd, key)
        reader.sees_state(room, "org.example.odd", odd, key)
        empty = writer.sends(room, {}, "org.example.empty")
        equal("content", reader.hears(room, empty)["content"], {})
        big = {"msgtype": "m.text", "body": "\N{GRINNING FACE}" * 14000}
        equal("content", reader.hears(room, writer.sends(room, big))["content"], big)
        status, _, _ = writer.request("PUT", f"/_matrix/client/v3/rooms/{quote(room)}/send/m.room.message/big", {"body": "x" * 70_000})
        equal("an event above the size of events is refused", status in (400, 413), True)
        path = f"/_matrix/client/v3/rooms/{quote(room)}/send/org.example.float/float"
        status, _, answer = writer.request("PUT", path, {"number": 1.5, "large": 2**60})
        if int(stage.version) >= 6:
            equal("a fraction", status, 400)
        elif status == 200:
            import json

            told = reader.hears(room, json.loads(answer)["event_id"])
            equal("content", told["content"], {"number": 1.5, "large": 2**60})
    talk(alice, bob, room)
    same_state(room, alice, bob)


@scenario(short=True)
def power_levels_of_old(stage):
    """Before version 10, levels may be strings."""
    alice, bob, room = meet(stage)
    levels = alice.asks(room, "m.room.power_levels")
    levels.setdefault("users", {})[bob.id] = "60"
    levels["ban"] = " 55 "
    if int(stage.version) >= 10:
        alice.refused(400, ("M_BAD_JSON", "M_INVALID_PARAM", "M_FORBIDDEN", "M_UNKNOWN"), "PUT", f"/rooms/{quote(room)}/state/m.room.power_levels/", levels)
        return
    status, _, _ = alice.request("PUT", f"/_matrix/client/v3/rooms/{quote(room)}/state/m.room.power_levels/", levels)
    if status == 200:
        bob.sees_state(room, "m.room.power_levels", levels)
        bob.sets(room, "m.room.topic", {"topic": "by bob"})
        alice.sees_state(room, "m.room.topic", {"topic": "by bob"})
    talk(alice, bob, room)
    same_state(room, alice, bob)


@scenario(since=12)
def several_creators(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, creation_content={"additional_creators": [bob.id]})
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    levels = bob.asks(room, "m.room.power_levels")
    levels["state_default"] = 70
    bob.sets(room, "m.room.power_levels", levels)
    alice.sees_state(room, "m.room.power_levels", levels)
    # Nobody is above a creator, not even another one.
    for one, other in (alice, bob), (bob, alice):
        one.refused(403, "M_FORBIDDEN", "POST", f"/rooms/{quote(room)}/kick", {"user_id": other.id})
        levels["users"] = {other.id: 100}
        status, _, _ = one.request("PUT", f"/_matrix/client/v3/rooms/{quote(room)}/state/m.room.power_levels/", levels)
        if status not in (400, 403):
            raise Mismatch(f"a creator stands in the power levels: {status}")
    talk(alice, bob, room)
    same_state(room, alice, bob)


@scenario(short=True)
def redactions_of_state(stage):
    """What a redaction leaves of an event goes by the room's version, and is the same on both servers."""
    alice, bob, room = meet(stage)
    version, server = int(stage.version), stage.here.name
    levels = {**alice.asks(room, "m.room.power_levels"), "invite": 3, "x": 1}
    kept = ["ban", "events", "events_default", "kick", "redact", "state_default", "users", "users_default"]
    kept += ["invite"] if version >= 11 else []
    cases = [
        ("m.room.power_levels", "", levels, {field: levels[field] for field in kept if field in levels}),
        ("m.room.join_rules", "", {"join_rule": "public", "allow": [], "x": 1}, {"join_rule": "public", **({"allow": []} if version >= 8 else {})}),
        ("m.room.history_visibility", "", {"history_visibility": "shared", "x": 1}, {"history_visibility": "shared"}),
        ("m.room.member", alice.id, {"membership": "join", "displayname": "A", "x": 1}, {"membership": "join"}),
        ("m.room.aliases", server, {"aliases": [], "x": 1}, {"aliases": []} if version < 6 else {}),
        ("m.room.topic", "", {"topic": "gone"}, {}),
        ("org.example.thing", "key", {"membership": "join", "redacts": "x"}, {}),
    ]
    for kind, key, content, left in cases:
        event = alice.sets(room, kind, content, key)
        is_shown = kind != "m.room.aliases"  # which Synapse shows nobody but as state
        if is_shown:
            bob.hears(room, event, kind)
        else:
            eventually("the aliases are known", lambda: (kind, key) in bob.state(room))
        bob.hears(room, alice.redacts(room, event, reason="a test"), "the redaction")
        for person in alice, bob:
            eventually(f"{kind} is redacted", lambda: equal(f"content for {person}", person.asks(room, kind, key), left) or True)
            if is_shown:
                equal(f"{kind} by itself", person.event(room, event)["content"], left)
    # A redaction is an event, too; from version 11 on, it keeps the event that it redacted.
    said = alice.sends(room, "one")
    redaction = alice.redacts(room, said, reason="to be gone")
    bob.hears(room, redaction)
    bob.hears(room, alice.redacts(room, redaction))
    for person in alice, bob:
        eventually("the redaction is redacted", lambda: equal(
            "content", person.event(room, redaction)["content"], {"redacts": said} if version >= 11 else {}) or True)
        equal("what it redacted", person.event(room, said)["content"], {})
    talk(alice, bob, room)
    same_state(room, alice, bob)


# Members


@scenario(short=True)
def kick_ban_leave_rejoin(stage):
    alice, bob, room = meet(stage)
    alice.acts("kick", room, bob, reason="a test")
    bob.sees_own(room, "leave")
    equal("reason", bob.room(room).content("m.room.member", bob.id).get("reason"), "a test")
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    talk(alice, bob, room)

    alice.acts("ban", room, bob)
    bob.sees_own(room, "leave")
    bob.sees_membership(room, bob, "ban")
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])
    bob.refused(403, "M_FORBIDDEN", "PUT", f"/rooms/{quote(room)}/send/m.room.message/x", {"msgtype": "m.text", "body": "no"})
    alice.acts("unban", room, bob)
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    talk(alice, bob, room)

    bob.leaves(room)
    alice.sees_membership(room, bob, "leave")
    bob.sees_own(room, "leave")
    missed = [alice.sends(room, f"missed {number}") for number in range(3)]
    alice.sets(room, "m.room.topic", {"topic": "while he was away"})
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    equal("topic", bob.asks(room, "m.room.topic")["topic"], "while he was away")
    talk(alice, bob, room)
    eventually("what was said meanwhile can be read", lambda: set(missed) <= {it["event_id"] for it in bob.pages(room)})
    same_state(room, alice, bob)


@scenario(short=True)
def moderators_of_the_other_server(stage):
    alice, bob, room = meet(stage)
    carol = stage.person(stage.here, "carol")
    dave = stage.person(stage.there, "dave")
    carol.joins(room)
    dave.joins(room, stage.here)
    promote(alice, room, bob, level=60)
    carol.sees_own(room, "join")
    bob.sees_membership(room, carol, "join")
    bob.acts("kick", room, carol)
    carol.sees_own(room, "leave")
    # Bob has seen her leave before, so that what he waits for is her return and not the join from before.
    bob.sees_membership(room, carol, "leave")
    carol.joins(room)
    bob.sees_membership(room, carol, "join")
    bob.acts("ban", room, carol)
    carol.sees_membership(room, carol, "ban")
    carol.refused(403, ("M_FORBIDDEN", "M_BAD_STATE"), "POST", f"/join/{quote(room)}", {})
    bob.acts("unban", room, carol)
    alice.sees_membership(room, carol, "leave")
    bob.sees_membership(room, carol, "leave")
    carol.joins(room)
    bob.sees_membership(room, carol, "join")
    alice.acts("kick", room, dave)
    dave.sees_own(room, "leave")
    same_state(room, alice, bob)


@scenario()
def the_last_one_returns(stage):
    """A server whose users all left hears nothing, and catches up by joining."""
    alice, bob, room = meet(stage)
    before = bob.state(room)
    bob.leaves(room)
    alice.sees_membership(room, bob, "leave")
    for number in range(30):
        alice.sends(room, f"unheard {number}")
    alice.sets(room, "m.room.name", {"name": "Another name"})
    bob.joins(room, stage.here)
    talk(alice, bob, room)
    after = same_state(room, alice, bob)
    if before == after:
        raise Mismatch("the state did not change")
    equal("name", bob.asks(room, "m.room.name")["name"], "Another name")


@scenario(short=True)
def the_founder_goes(stage):
    """The server of the room's first user leaves it, and comes back by way of the other one."""
    alice, bob, room = meet(stage, name="Before")
    levels = alice.asks(room, "m.room.power_levels")
    levels.setdefault("users", {})[bob.id] = 100 if stage.version != "12" else 140
    levels["events"]["m.room.tombstone"] = 100
    bob.hears(room, alice.sets(room, "m.room.power_levels", levels))
    alice.leaves(room)
    bob.sees_membership(room, alice, "leave")
    bob.sets(room, "m.room.name", {"name": "After"})
    said = [bob.sends(room, f"alone {number}") for number in range(12)]
    carol = stage.person(stage.here, "carol")
    carol.joins(room, stage.there)
    bob.sees_membership(room, carol, "join")
    equal("name", carol.asks(room, "m.room.name"), {"name": "After"})
    eventually("what was said meanwhile can be read", lambda: set(said) <= {it["event_id"] for it in carol.pages(room)})
    talk(bob, carol, room)
    alice.joins(room, stage.there)
    bob.sees_membership(room, alice, "join")
    talk(alice, bob, room)
    same_state(room, alice, bob)


@scenario()
def many_join_at_once(stage):
    alice = stage.person(stage.here)
    room = alice.creates(stage.version)
    crew = [stage.person(stage.there, f"b{number}") for number in range(5)]
    own = [stage.person(stage.here, f"a{number}") for number in range(3)]
    at_once(*[lambda it=it: it.joins(room, stage.here) for it in crew + own])
    members = {alice.id, *(it.id for it in crew + own)}

    def joined(person):
        told = person.call("GET", f"/rooms/{quote(room)}/joined_members")["joined"]
        equal(f"members that {person} sees", set(told), members)
        return True

    for person in alice, crew[0]:
        eventually("everybody is in the room", lambda: joined(person))
    at_once(*[lambda it=it: it.leaves(room) for it in crew[1:] + own[1:]])
    members = {alice.id, crew[0].id, own[0].id}
    for person in alice, crew[0]:
        eventually("only some are in the room", lambda: joined(person))
    talk(alice, crew[0], room)
    same_state(room, alice, crew[0])


@scenario(short=True)
def invitation_accepted(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    dave = stage.person(stage.there, "dave")
    carol = stage.person(stage.here, "carol")
    room = alice.creates(stage.version, preset="private_chat", name="By invitation")
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])
    alice.acts("invite", room, bob, reason="come in")
    seen = bob.sees_own(room, "invite")
    equal("name in the invitation", seen.stripped["m.room.name", ""]["content"], {"name": "By invitation"})
    own = seen.stripped["m.room.member", bob.id]
    equal("inviter", own["sender"], alice.id)
    equal("membership", own["content"]["membership"], "invite")
    bob.joins(room)
    alice.sees_membership(room, bob, "join")
    bob.sees_own(room, "join")
    talk(alice, bob, room)
    # From the other side: one of its own, and one of the server where the room began.
    for other in dave, carol:
        bob.acts("invite", room, other)
        other.sees_own(room, "invite")
        alice.knows_membership(room, other, "invite")
        other.joins(room)
        alice.sees_membership(room, other, "join")
        bob.sees_membership(room, other, "join")
        talk(other, bob if other is carol else alice, room)
    same_state(room, alice, bob)


@scenario(short=True)
def invitation_rejected(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, preset="private_chat", invite=[bob.id], is_direct=True)
    seen = bob.sees_own(room, "invite")
    equal("is_direct", seen.stripped["m.room.member", bob.id]["content"].get("is_direct"), True)
    bob.leaves(room, reason="no time")
    bob.sees_own(room, "leave")
    alice.sees_membership(room, bob, "leave")
    equal("reason", alice.room(room).content("m.room.member", bob.id).get("reason"), "no time")
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])
    # A second one may still be accepted; and one from the other side, in a room that both know, rejected.
    alice.acts("invite", room, bob)
    bob.sees_own(room, "invite")
    bob.joins(room)
    alice.sees_membership(room, bob, "join")
    carol = stage.person(stage.here, "carol")
    bob.acts("invite", room, carol)
    carol.sees_own(room, "invite")
    alice.knows_membership(room, carol, "invite")
    carol.leaves(room)
    bob.sees_membership(room, carol, "leave")


@scenario()
def invitation_and_ban(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, preset="private_chat", invite=[bob.id])
    bob.sees_own(room, "invite")
    # Synapse neither tells nor hears of a ban where the server of who is banned is not in the room.
    alice.acts("ban", room, bob, reason="a mistake")
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])
    alice.refused(403, ("M_FORBIDDEN", "M_BAD_STATE"), "POST", f"/rooms/{quote(room)}/invite", {"user_id": bob.id})
    alice.acts("unban", room, bob)
    alice.acts("invite", room, bob)
    bob.sees_own(room, "invite")
    bob.joins(room)
    talk(alice, bob, room)


@scenario()
def forgotten_and_joined_again(stage):
    alice, bob, room = meet(stage)
    said = [alice.sends(room, f"number {number}") for number in range(5)]
    bob.hears(room, said[-1])
    bob.leaves(room)
    bob.sees_own(room, "leave")
    bob.call("POST", f"/rooms/{quote(room)}/forget")
    alice.sees_membership(room, bob, "leave")
    said += [alice.sends(room, f"number {number}") for number in range(5, 10)]
    bob.joins(room, stage.here)
    bob.sees_own(room, "join")
    alice.sees_membership(room, bob, "join")
    talk(alice, bob, room)
    eventually("all that was said can be read", lambda: set(said) <= {event["event_id"] for event in bob.pages(room)})
    same_state(room, alice, bob)


@scenario()
def rooms_that_stay_at_home(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, creation_content={"m.federate": False})
    # An invitation may be sent by the room's rules, and Synapse refuses it all the same. It lets nobody in.
    status, _, _ = alice.request("POST", f"/_matrix/client/v3/rooms/{quote(room)}/invite", {"user_id": bob.id})
    equal("status of the invitation", status in (200, 403), True)
    try:
        bob.joins(room, stage.here)
    except Refused as refused:
        equal("status", refused.status in (403, 404), True)
    else:
        raise Mismatch("bob joined a room that does not federate")


@scenario()
def joined_past_a_dead_server(stage):
    """Of the servers that may know the room, the first does not answer."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version)
    names = ["127.0.0.9:9", stage.here.name]
    bob.call("POST", f"/join/{quote(room)}", {}, [(key, name) for key in ("server_name", "via") for name in names])
    alice.sees_membership(room, bob, "join")
    talk(alice, bob, room)


@scenario()
def invitation_withdrawn(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, preset="private_chat", invite=[bob.id])
    bob.sees_own(room, "invite")
    alice.acts("kick", room, bob)
    bob.sees_own(room, "leave")
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])
    alice.acts("invite", room, bob)
    bob.sees_own(room, "invite")
    bob.joins(room)
    talk(alice, bob, room)


@scenario(since=7)
def knocks(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, preset="private_chat", name="Knock please", initial_state=[
        {"type": "m.room.join_rules", "state_key": "", "content": {"join_rule": "knock"}}])
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])

    def bob_knocks(reason):
        bob.knocks(room, stage.here, reason)
        alice.until(f"bob knocks: {reason}", lambda it: (
            (own := it.room(room).content("m.room.member", bob.id) or {}).get("membership") == "knock"
            and own.get("reason") == reason))
        return bob.sees_own(room, "knock")

    seen = bob_knocks("first")
    equal("name at the door", seen.stripped["m.room.name", ""]["content"], {"name": "Knock please"})
    bob.leaves(room)  # thinks better of it
    bob.sees_own(room, "leave")
    if stage.there.kind != "synapse":  # which tells nobody but its own user
        alice.sees_membership(room, bob, "leave")
    bob_knocks("second")
    # In vain, which the specification has no way to tell bob's server.
    alice.acts("kick", room, bob)
    alice.sees_membership(room, bob, "leave")
    bob_knocks("third")
    alice.acts("invite", room, bob)
    bob.sees_own(room, "invite")
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    talk(alice, bob, room)
    # The other server lets somebody in, too.
    promote(alice, room, bob, level=50)
    carol = stage.person(stage.here, "carol")
    carol.knocks(room, stage.here)
    bob.sees_membership(room, carol, "knock")
    bob.acts("invite", room, carol)
    carol.sees_own(room, "invite")
    alice.knows_membership(room, carol, "invite")
    carol.joins(room)
    bob.sees_membership(room, carol, "join")
    same_state(room, alice, bob)


@scenario(since=8)
def restricted_rooms(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    dave = stage.person(stage.there, "dave")
    space = alice.creates(stage.version, creation_content={"type": "m.space"})
    rules = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}
    room = alice.creates(stage.version, preset="private_chat", initial_state=[
        {"type": "m.room.join_rules", "state_key": "", "content": rules}])
    via = [("server_name", stage.here.name), ("via", stage.here.name)]
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, via)
    bob.joins(space, stage.here)
    alice.sees_membership(space, bob, "join")
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    equal("who let bob in", alice.room(room).content("m.room.member", bob.id).get("join_authorised_via_users_server"), alice.id)
    talk(alice, bob, room)
    # A server that is in the room and can't let anybody in itself asks one that can.
    dave.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, via)
    dave.joins(space, stage.here)
    alice.sees_membership(space, dave, "join")
    dave.joins(room, stage.here)
    alice.sees_membership(room, dave, "join")
    bob.sees_membership(room, dave, "join")
    talk(alice, dave, room)
    # Who leaves may come back as long as they are in the space, and then no more.
    dave.leaves(room)
    alice.sees_membership(room, dave, "leave")
    dave.leaves(space)
    alice.sees_membership(space, dave, "leave")
    dave.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, via)
    same_state(room, alice, bob)


@scenario(since=8)
def restricted_rooms_of_the_other_server(stage):
    """Somebody of the other server has the right to let people in, and both servers use whom they have."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    dave, carol = stage.person(stage.there, "dave"), stage.person(stage.here, "carol")
    space = alice.creates(stage.version, creation_content={"type": "m.space"})
    rules = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}
    room = alice.creates(stage.version, preset="private_chat", initial_state=[
        {"type": "m.room.join_rules", "state_key": "", "content": rules}])
    for person in bob, dave, carol:
        person.joins(space, stage.here)
        alice.sees_membership(space, person, "join")
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    promote(alice, room, bob)
    dave.joins(room, stage.here)
    alice.sees_membership(room, dave, "join")
    equal("who let dave in", alice.room(room).content("m.room.member", dave.id).get("join_authorised_via_users_server").split(":", 1)[1], stage.there.name)
    # The founder leaves, and with her the last one here; now only bob's server can let carol in.
    alice.leaves(room)
    bob.sees_membership(room, alice, "leave")
    carol.joins(room, stage.there)
    bob.sees_membership(room, carol, "join")
    equal("who let carol in", bob.room(room).content("m.room.member", carol.id).get("join_authorised_via_users_server").split(":", 1)[1], stage.there.name)
    talk(bob, carol, room)
    same_state(room, bob, carol)


@scenario(since=8)
def restricted_by_a_space_elsewhere(stage):
    """The space began on the other server, and the room's server knows who is in it because it is, too."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    dave = stage.person(stage.there, "dave")
    space = bob.creates(stage.version, creation_content={"type": "m.space"})
    alice.joins(space, stage.there)
    bob.sees_membership(space, alice, "join")
    room = alice.creates(stage.version, preset="private_chat", initial_state=[
        {"type": "m.room.join_rules", "state_key": "", "content": {
            "join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}}])
    bob.sets(space, "m.space.child", {"via": [stage.here.name]}, room)
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    dave.joins(space)
    alice.sees_membership(space, dave, "join")
    bob.acts("kick", space, dave)
    alice.sees_membership(space, dave, "leave")
    dave.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(room)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])
    dave.joins(space)
    # Alice has seen him leave before, so that what she waits for is his return.
    alice.sees_membership(space, dave, "join")
    dave.joins(room, stage.here)
    alice.sees_membership(room, dave, "join")
    talk(alice, dave, room)
    same_state(room, alice, bob)


@scenario(since=10)
def knock_restricted_rooms(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    dave = stage.person(stage.there, "dave")
    space = alice.creates(stage.version, creation_content={"type": "m.space"})
    rules = {"join_rule": "knock_restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}
    room = alice.creates(stage.version, preset="private_chat", initial_state=[
        {"type": "m.room.join_rules", "state_key": "", "content": rules}])
    bob.joins(space, stage.here)
    alice.sees_membership(space, bob, "join")
    bob.joins(room, stage.here)
    alice.sees_membership(room, bob, "join")
    dave.knocks(room, stage.here)
    alice.sees_membership(room, dave, "knock")
    bob.sees_membership(room, dave, "knock")
    alice.acts("invite", room, dave)
    dave.sees_own(room, "invite")
    bob.knows_membership(room, dave, "invite")
    dave.joins(room)
    bob.sees_membership(room, dave, "join")
    same_state(room, alice, bob)


# What passes and is not kept in rooms


@scenario()
def receipts_and_typing(stage):
    alice, bob, room = meet(stage)
    for reader, writer in (bob, alice), (alice, bob):
        said = writer.sends(room, "read me")
        reader.hears(room, said)
        reader.call("POST", f"/rooms/{quote(room)}/receipt/m.read/{quote(said)}", {})
        writer.until("the receipt", lambda it: it.room(room).receipts.get((reader.id, "m.read", None)) == said)
        again = writer.sends(room, "read me, too")
        reader.hears(room, again)
        reader.call("POST", f"/rooms/{quote(room)}/receipt/m.read.private/{quote(again)}", {})
        threaded = writer.sends(room, {"msgtype": "m.text", "body": "in a thread", "m.relates_to": {
            "rel_type": "m.thread", "event_id": said}})
        reader.hears(room, threaded)
        reader.call("POST", f"/rooms/{quote(room)}/receipt/m.read/{quote(threaded)}", {"thread_id": said})
        writer.until("the receipt in the thread", lambda it: it.room(room).receipts.get((reader.id, "m.read", said)) == threaded)
        private = [key for key in writer.room(room).receipts if key[1] == "m.read.private" and key[0] != writer.id]
        equal("private receipts of others", private, [])

        typing = f"/rooms/{quote(room)}/typing/{quote(reader.id)}"
        reader.call("PUT", typing, {"typing": True, "timeout": 30000})
        writer.until("the other types", lambda it: reader.id in it.room(room).typing)
        reader.call("PUT", typing, {"typing": False})
        writer.until("the other has stopped typing", lambda it: reader.id not in it.room(room).typing)


@scenario()
def presence(stage):
    alice, bob, _ = meet(stage)
    for one, other in (alice, bob), (bob, alice):
        for state, text in ("online", "here I am"), ("unavailable", "at lunch"):
            one.call("PUT", f"/presence/{quote(one.id)}/status", {"presence": state, "status_msg": text})
            other.until(f"the other is {state}", lambda it: (
                it.presence.get(one.id, {}).get("presence") == state and it.presence[one.id].get("status_msg") == text))


@scenario()
def presence_of_who_comes(stage):
    """Whoever comes into a room learns how present its members are, and they learn it of the newcomer, though nothing changes then."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    for person in alice, bob:
        person.call("PUT", f"/presence/{quote(person.id)}/status", {"presence": "online", "status_msg": f"at {person.server}"})
    room = alice.creates(stage.version)
    bob.joins(room, stage.here)
    for one, other in (bob, alice), (alice, bob):
        other.until("the other is online", lambda it: (
            it.presence.get(one.id, {}).get("presence") == "online" and it.presence[one.id].get("status_msg") == f"at {one.server}"))


@scenario()
def to_device_messages(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    for one, other in (alice, bob), (bob, alice):
        other.looks()
        for number, device in enumerate((other.device, "*", other.device)):
            content = {"number": number, "text": "ü" * 100}
            one.call("PUT", f"/sendToDevice/org.example.note/{secrets.token_hex(8)}", {"messages": {other.id: {device: content}}})
            told = other.until("the message to the device", lambda it: [
                event for event in it.to_device if event["content"].get("number") == number])
            equal("messages", [(event["sender"], event["type"], event["content"]) for event in told],
                  [(one.id, "org.example.note", content)])
        # In their order, and once, also when there are many.
        for number in range(100, 130):
            one.call("PUT", f"/sendToDevice/org.example.note/{secrets.token_hex(8)}", {
                "messages": {other.id: {other.device: {"number": number}}}})
        other.until("the last of many", lambda it: any(event["content"]["number"] == 129 for event in it.to_device))
        numbers = [event["content"]["number"] for event in other.to_device if event["content"]["number"] >= 100]
        equal("numbers", numbers, list(range(100, 130)))


# Look-ups


@scenario()
def profiles(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    for one, other in (alice, bob), (bob, alice):
        for name in "First", "Second ü":
            one.call("PUT", f"/profile/{quote(one.id)}/displayname", {"displayname": name})
            told = eventually(f"the name is {name}", lambda: (
                it := other.call("GET", f"/profile/{quote(one.id)}")).get("displayname") == name and it, PROFILE_SECONDS_MAX)
        picture = f"mxc://{one.server.name}/picture"
        one.call("PUT", f"/profile/{quote(one.id)}/avatar_url", {"avatar_url": picture})
        eventually("the picture is told", lambda: other.call("GET", f"/profile/{quote(one.id)}/avatar_url") == {"avatar_url": picture}, PROFILE_SECONDS_MAX)
        equal("name alone", other.call("GET", f"/profile/{quote(one.id)}/displayname"), {"displayname": told["displayname"]})
        other.refused(404, "M_NOT_FOUND", "GET", f"/profile/{quote('@nobody:' + one.server.name)}")


@scenario()
def profile_fields(stage):
    alice, bob, room = meet(stage)
    for one, other in (alice, bob), (bob, alice):
        fields = {"m.tz": "Europe/Paris", "org.example.field": {"deep": ["ü", 1, None]}}
        for field, value in fields.items():
            one.call("PUT", f"/profile/{quote(one.id)}/{field}", {field: value})

        def told():
            profile = other.call("GET", f"/profile/{quote(one.id)}")
            equal("fields", {field: profile.get(field) for field in fields}, fields)
            equal("a field alone", other.call("GET", f"/profile/{quote(one.id)}/m.tz"), {"m.tz": "Europe/Paris"})
            return True

        eventually("the fields are told", told, PROFILE_SECONDS_MAX)
        picture = f"mxc://{one.server.name}/picture"
        one.call("PUT", f"/profile/{quote(one.id)}/avatar_url", {"avatar_url": picture})
        other.until("the new picture", lambda it: (
            it.room(room).content("m.room.member", one.id) or {}).get("avatar_url") == picture)
        one.call("DELETE", f"/profile/{quote(one.id)}/m.tz")
        eventually("the field is gone", lambda: "m.tz" not in other.call("GET", f"/profile/{quote(one.id)}"), PROFILE_SECONDS_MAX)


@scenario()
def user_directory(stage):
    alice, bob, _ = meet(stage)
    stranger = stage.person(stage.there, "stranger")
    for one, other in (alice, bob), (bob, alice):
        word = f"Name{secrets.token_hex(4)}"
        one.call("PUT", f"/profile/{quote(one.id)}/displayname", {"displayname": f"{word} Doe"})
        if one is bob:
            stranger.call("PUT", f"/profile/{quote(stranger.id)}/displayname", {"displayname": f"{word} Roe"})

        def found():
            results = other.call("POST", "/user_directory/search", {"search_term": word, "limit": 20})["results"]
            equal("users", [(user["user_id"], user.get("display_name")) for user in results], [(one.id, f"{word} Doe")])
            return True

        eventually(f"{other} finds {one}", found)


@scenario()
def aliases(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    local = f"well-{secrets.token_hex(4)}"
    alias = f"#{local}:{stage.here.name}"
    room = alice.creates(stage.version, room_alias_name=local)
    told = bob.call("GET", f"/directory/room/{quote(alias)}")
    equal("room", told["room_id"], room)
    if stage.here.name not in told["servers"]:
        raise Mismatch(f"servers of the alias: {told['servers']}")
    equal("joined", bob.call("POST", f"/join/{quote(alias)}", {})["room_id"], room)
    alice.sees_membership(room, bob, "join")
    talk(alice, bob, room)
    other = f"#other-{secrets.token_hex(4)}:{stage.there.name}"
    bob.call("PUT", f"/directory/room/{quote(other)}", {"room_id": room})
    equal("by the other alias", alice.call("GET", f"/directory/room/{quote(other)}")["room_id"], room)
    alice.call("DELETE", f"/directory/room/{quote(alias)}")
    bob.refused(404, "M_NOT_FOUND", "GET", f"/directory/room/{quote(alias)}")
    bob.refused(404, "M_NOT_FOUND", "POST", f"/join/{quote(alias)}", {})


@scenario()
def public_rooms(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    word = f"w{secrets.token_hex(4)}"
    rooms = [alice.creates(stage.version, name=f"{word} {number}", topic="open", visibility="public") for number in range(3)]
    space = alice.creates(stage.version, name=f"{word} space", visibility="public", creation_content={"type": "m.space"})
    hidden = alice.creates(stage.version, name=f"{word} hidden", visibility="private")

    def listed(**filter):
        found, since = [], None
        for _ in range(20):
            body = {"limit": 2, "filter": {"generic_search_term": word, **filter}, **({"since": since} if since else {})}
            page = bob.call("POST", "/publicRooms", body, {"server": stage.here.name})
            found += page["chunk"]
            since = page.get("next_batch")
            if not since:
                break
        return {room["room_id"]: room for room in found}

    equal("rooms found", set(listed()), {*rooms, space})
    equal("spaces found", set(listed(room_types=["m.space"])), {space})
    one = listed(room_types=[None])[rooms[0]]
    equal("what is told", (one["name"], one["topic"], one["num_joined_members"], one.get("join_rule", "public")), (f"{word} 0", "open", 1, "public"))

    def whole():
        told = bob.call("GET", "/publicRooms", query={"server": stage.here.name, "limit": 500})
        ids = {room["room_id"] for room in told["chunk"]}
        equal("the hidden room is listed", hidden in ids, False)
        equal("rooms that the list lacks", {*rooms, space} - ids, set())
        return True

    # A server may keep the whole list of another one for a while.
    eventually("the rooms are in the whole list", whole, PROFILE_SECONDS_MAX)
    bob.joins(rooms[0], stage.here)
    alice.sees_membership(rooms[0], bob, "join")


@scenario()
def spaces(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    version, here, there = stage.version, stage.here, stage.there
    space = alice.creates(version, name="Space", creation_content={"type": "m.space"})
    inner = alice.creates(version, name="Inner", creation_content={"type": "m.space"})
    public = alice.creates(version, name="Public")
    private = alice.creates(version, name="Private", preset="private_chat")
    deep = alice.creates(version, name="Deep")
    theirs = bob.creates(version, name="Theirs")
    wanted = {space: "Space", inner: "Inner", public: "Public", deep: "Deep", theirs: "Theirs"}
    if int(version) >= 8:
        restricted = alice.creates(version, name="Restricted", preset="private_chat", initial_state=[
            {"type": "m.room.join_rules", "state_key": "", "content": {
                "join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}}])
        alice.sets(space, "m.space.child", {"via": [here.name]}, restricted)
        wanted[restricted] = "Restricted"
    for parent, child, via in (space, inner, here), (space, public, here), (space, private, here), (space, theirs, there), (inner, deep, here):
        alice.sets(parent, "m.space.child", {"via": [via.name]}, child)
    bob.joins(space, here)
    alice.sees_membership(space, bob, "join")

    def tree(person, **query):
        found, start = [], None
        for _ in range(20):
            page = person.call("GET", f"/_matrix/client/v1/rooms/{quote(space)}/hierarchy", query={
                "limit": 3, **query, **({"from": start} if start else {})})
            found += page["rooms"]
            start = page.get("next_batch")
            if not start:
                break
        return found

    # Alice is in private as well.
    for person, names in (bob, wanted), (alice, {**wanted, private: "Private"}):
        rooms = tree(person)
        equal(f"rooms that {person} sees", {room["room_id"]: room.get("name") for room in rooms}, names)
        first = rooms[0]
        equal("the first", (first["room_id"], first.get("room_type")), (space, "m.space"))
        children = {event["state_key"] for event in first["children_state"]}
        equal("children", children, {*names, private} - {space, deep})
    equal("rooms to depth 1", {room["room_id"] for room in tree(bob, max_depth=1)}, set(wanted) - {deep})


@scenario()
def summaries(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, name="In short")
    told = bob.call("GET", f"/_matrix/client/v1/room_summary/{quote(room)}", query={"via": stage.here.name})
    equal("summary", (told["room_id"], told["name"], told["num_joined_members"]), (room, "In short", 1))
    private = alice.creates(stage.version, preset="private_chat")
    bob.refused(404, ("M_NOT_FOUND", "M_FORBIDDEN"), "GET", f"/_matrix/client/v1/room_summary/{quote(private)}", query={"via": stage.here.name})


@scenario()
def media(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    for one, other in (alice, bob), (bob, alice):
        data = secrets.token_bytes(300_000)
        status, _, answer = one.request("POST", "/_matrix/media/v3/upload?filename=a.bin", data, {"Content-Type": "application/octet-stream"})
        equal("upload", status, 200)
        import json

        path = json.loads(answer)["content_uri"].removeprefix("mxc://")
        status, headers, got = other.request("GET", f"/_matrix/client/v1/media/download/{path}")
        equal("download", (status, headers.get("Content-Type"), got == data), (200, "application/octet-stream", True))
        if "a.bin" not in headers.get("Content-Disposition", ""):
            raise Mismatch(f"the name of the file is gone: {headers.get('Content-Disposition')}")
        other.refused(404, "M_NOT_FOUND", "GET", f"/_matrix/client/v1/media/download/{one.server.name}/nothing{secrets.token_hex(4)}")


# The past


@scenario()
def backfill(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version)
    count = 500 if stage.is_newest else 120
    sent = [alice.sends(room, f"number {number}") for number in range(count)]
    topic = alice.sets(room, "m.room.topic", {"topic": "last"})
    bob.joins(room, stage.here)

    def whole():
        found = bob.pages(room, limit=60)
        ids = [event["event_id"] for event in found]
        equal("events that came twice", len(ids) - len(set(ids)), 0)
        messages = [event["event_id"] for event in reversed(found) if event["type"] == "m.room.message"]
        if messages != sent:
            missing = [number for number, event in enumerate(sent) if event not in set(messages)]
            raise Mismatch(f"{len(messages)} messages of {count}, missing {missing[:5]}..{missing[-5:]}"
                           if missing else "the messages are not in their order")
        equal("the first event", found[-1]["type"], "m.room.create")
        if topic not in ids:
            raise Mismatch("the topic is not among them")
        return True

    eventually("all events can be paged to", whole, 60)
    # An event of long ago, by itself and with what is around it.
    equal("body", bob.event(room, sent[7])["content"]["body"], "number 7")
    around = bob.call("GET", f"/rooms/{quote(room)}/context/{quote(sent[50])}", query={"limit": 10})
    equal("in the middle", around["event"]["event_id"], sent[50])
    near = {event["event_id"] for event in around["events_before"] + around["events_after"]}
    if not near or not near <= set(sent[38:63]):
        raise Mismatch(f"around number 50 are {[sent.index(event) if event in sent else event for event in near]}")
    talk(alice, bob, room)


@scenario()
def who_joined_late_sees_no_past(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version, initial_state=[
        {"type": "m.room.history_visibility", "state_key": "", "content": {"history_visibility": "joined"}}])
    before = alice.sends(room, "not for bob")
    bob.joins(room, stage.here)
    after = alice.sends(room, "for bob")
    bob.hears(room, after)
    seen = {event["event_id"] for event in bob.pages(room)}
    equal("sees (before, after)", (before in seen, after in seen), (False, True))
    bob.refused(404, "M_NOT_FOUND", "GET", f"/rooms/{quote(room)}/event/{quote(before)}")


@scenario()
def history_visibilities(stage):
    """What was said before one was invited, between that and the join, and after it."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    wanted = {"world_readable": (True, True), "shared": (True, True), "invited": (False, True), "joined": (False, False)}
    for visibility, seen in wanted.items():
        room = alice.creates(stage.version, initial_state=[
            {"type": "m.room.history_visibility", "state_key": "", "content": {"history_visibility": visibility}}])
        before = alice.sends(room, "before")
        alice.acts("invite", room, bob)
        bob.sees_own(room, "invite")
        between = alice.sends(room, "between")
        bob.joins(room, stage.here)
        bob.hears(room, alice.sends(room, "after"))

        def whole():
            found = {event["event_id"] for event in bob.pages(room)}
            equal(f"seen of a room that is {visibility}", (before in found, between in found), seen)
            return True

        eventually("all that may be seen is seen", whole)
        for event, is_seen in zip((before, between), seen):
            if not is_seen:
                bob.refused(404, "M_NOT_FOUND", "GET", f"/rooms/{quote(room)}/event/{quote(event)}")
                bob.refused((403, 404), ("M_NOT_FOUND", "M_FORBIDDEN"), "GET", f"/rooms/{quote(room)}/context/{quote(event)}")


@scenario()
def relations_from_before_the_join(stage):
    """Edits, reactions, threads and redactions count for who gets them together with what they speak of, long after."""
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version)
    first = alice.sends(room, "first")
    edit = alice.sends(room, {
        "msgtype": "m.text", "body": "* second", "m.new_content": {"msgtype": "m.text", "body": "second"},
        "m.relates_to": {"rel_type": "m.replace", "event_id": first}})
    reaction = alice.sends(room, {"m.relates_to": {"rel_type": "m.annotation", "event_id": first, "key": "+"}}, "m.reaction")
    replies = [alice.sends(room, {"msgtype": "m.text", "body": f"reply {number}", "m.relates_to": {
        "rel_type": "m.thread", "event_id": first}}) for number in range(3)]
    gone = alice.sends(room, "to be redacted")
    redaction = alice.redacts(room, gone)
    for number in range(60):
        alice.sends(room, f"later {number}")
    bob.joins(room, stage.here)

    def whole():
        found = {event["event_id"]: event for event in bob.pages(room)}
        lacking = {first, edit, reaction, gone, redaction, *replies} - set(found)
        equal("events that are lacking", lacking, set())
        equal("content of what was redacted", found[gone]["content"], {})
        bundled = bob.event(room, first)["unsigned"]["m.relations"]
        equal("edit", bundled["m.replace"]["event_id"], edit)
        thread = bundled["m.thread"]
        equal("thread", (thread["latest_event"]["event_id"], thread["count"]), (replies[-1], 3))
        path = f"/_matrix/client/v1/rooms/{quote(room)}/relations/{quote(first)}"
        equal("reactions", [it["event_id"] for it in bob.call("GET", f"{path}/m.annotation")["chunk"]], [reaction])
        equal("replies", [it["event_id"] for it in bob.call("GET", f"{path}/m.thread")["chunk"]], replies[::-1])
        return True

    eventually("everything that relates is found", whole, 40)


@scenario()
def a_room_with_much_state(stage):
    alice = stage.person(stage.here)
    room = alice.creates(stage.version, initial_state=[
        {"type": "org.example.thing", "state_key": f"key {number}", "content": {"number": number}} for number in range(300)])
    crew = [stage.person(stage.here, f"c{number}") for number in range(12)]
    for person in crew:
        person.joins(room)
    bob, dave = stage.person(stage.there, "bob"), stage.person(stage.there, "dave")
    bob.joins(room, stage.here)
    talk(alice, bob, room)
    dave.joins(room, stage.here)
    alice.sees_membership(room, dave, "join")
    equal("members", len(bob.call("GET", f"/rooms/{quote(room)}/joined_members")["joined"]), 15)
    equal("a state", bob.asks(room, "org.example.thing", "key 299"), {"number": 299})
    same_state(room, alice, bob)


@scenario()
def an_event_near_a_time(stage):
    alice, bob = stage.person(stage.here), stage.person(stage.there, "bob")
    room = alice.creates(stage.version)
    first = alice.sends(room, "first")
    time.sleep(0.05)
    moment = alice.event(room, first)["origin_server_ts"] + 1
    second = alice.sends(room, "second")
    for number in range(30):
        alice.sends(room, f"later {number}")
    bob.joins(room, stage.here)
    path = f"/_matrix/client/v1/rooms/{quote(room)}/timestamp_to_event"

    def found():
        equal("forwards", bob.call("GET", path, query={"ts": moment, "dir": "f"})["event_id"], second)
        equal("backwards", bob.call("GET", path, query={"ts": moment, "dir": "b"})["event_id"], first)
        return True

    eventually("the event is found by its time", found)


# Rooms that are replaced


@scenario(short=True)
def upgraded_rooms(stage):
    alice, bob, room = meet(stage, name="Old house")
    newer = "11" if stage.version == "12" else "12"
    other = alice.call("POST", f"/rooms/{quote(room)}/upgrade", {"new_version": newer})["replacement_room"]
    bob.until("the tombstone", lambda it: (it.room(room).content("m.room.tombstone") or {}).get("replacement_room") == other)
    bob.until("the old room is closed", lambda it: it.room(room).content("m.room.power_levels").get("events_default", 0) > 0)
    bob.refused(403, "M_FORBIDDEN", "PUT", f"/rooms/{quote(room)}/send/m.room.message/x", {"msgtype": "m.text", "body": "no"})
    bob.joins(other, stage.here)
    alice.sees_membership(other, bob, "join")
    create = bob.asks(other, "m.room.create")
    equal("version and predecessor", (create["room_version"], create["predecessor"]["room_id"]), (newer, room))
    equal("name", bob.asks(other, "m.room.name"), {"name": "Old house"})
    talk(alice, bob, other)
    same_state(other, alice, bob)


@scenario()
def upgraded_by_the_other_server(stage):
    """A moderator of the other server replaces the room; both sides find their settings in the new one, and its aliases."""
    alice, bob, room = meet(stage, name="Old house")
    levels = alice.asks(room, "m.room.power_levels")
    levels.setdefault("users", {})[bob.id] = 100
    levels["events"]["m.room.tombstone"] = 100
    bob.hears(room, alice.sets(room, "m.room.power_levels", levels))
    alias = f"#house-{secrets.token_hex(4)}:{stage.there.name}"
    bob.call("PUT", f"/directory/room/{quote(alias)}", {"room_id": room})
    for person in alice, bob:
        person.call("PUT", f"/user/{quote(person.id)}/rooms/{quote(room)}/tags/u.mine", {"order": 0.25})
        person.call("PUT", f"/pushrules/global/room/{quote(room)}", {"actions": ["notify"]})
    newer = "11" if stage.version == "12" else "12"
    other = bob.call("POST", f"/rooms/{quote(room)}/upgrade", {"new_version": newer})["replacement_room"]
    alice.until("the tombstone", lambda it: (it.room(room).content("m.room.tombstone") or {}).get("replacement_room") == other)
    alice.joins(other, stage.there)
    bob.sees_membership(other, alice, "join")
    equal("the alias", alice.call("GET", f"/directory/room/{quote(alias)}")["room_id"], other)
    equal("name", alice.asks(other, "m.room.name"), {"name": "Old house"})
    for person in alice, bob:
        def carried():
            tags = person.call("GET", f"/user/{quote(person.id)}/rooms/{quote(other)}/tags")["tags"]
            equal(f"tags of {person}", tags, {"u.mine": {"order": 0.25}})
            rules = person.call("GET", "/pushrules/")["global"].get("room", [])
            equal(f"{person} has the rule for the new room", other in {rule["rule_id"] for rule in rules}, True)
            return True

        eventually("the settings are carried over", carried)
    talk(alice, bob, other)
    same_state(other, alice, bob)


# Access lists


@scenario()
def access_lists(stage):
    alice, bob, room = meet(stage)
    # Whether a denied server is still told so is for the other one to decide.
    alice.sets(room, "m.room.server_acl", {"allow": ["*"], "deny": [stage.there.address], "allow_ip_literals": True})
    unheard = bob.sends(room, "nobody hears this")
    heard = alice.sends(room, "alice still speaks")
    alice.hears(room, heard)
    time.sleep(3)
    alice.looks()
    equal("heard of a denied server", alice.room(room).find(unheard), None)
    alice.sets(room, "m.room.server_acl", {"allow": ["*"], "deny": [], "allow_ip_literals": True})
    eventually("bob's server is heard again", lambda: alice.hears(room, bob.sends(room, "again"), seconds=5), 60)
    talk(alice, bob, room)
    closed = alice.creates(stage.version, initial_state=[
        {"type": "m.room.server_acl", "state_key": "", "content": {"allow": ["*"], "deny": [stage.there.address], "allow_ip_literals": True}}])
    bob.refused(403, "M_FORBIDDEN", "POST", f"/join/{quote(closed)}", {}, [("server_name", stage.here.name), ("via", stage.here.name)])


# Disagreement


def at_once(*acts):
    with concurrent.futures.ThreadPoolExecutor(len(acts)) as crew:
        return [it.result() for it in [crew.submit(act) for act in acts]]


@scenario(short=True)
def states_changed_at_once(stage):
    """Both sides change the same state without waiting for each other, and end with one state."""
    alice, bob, room = meet(stage)
    promote(alice, room, bob, level=90)

    def changes(person, label):
        for number in range(6):
            person.sets(room, "m.room.topic", {"topic": f"{label} {number}"})
            person.sets(room, "org.example.counter", {"by": label, "number": number}, f"key{number % 3}")
            person.sends(room, f"{label} {number}")

    at_once(lambda: changes(alice, "alice"), lambda: changes(bob, "bob"))
    talk(alice, bob, room)
    same_state(room, alice, bob, 40)


@scenario()
def a_flood(stage):
    """Many speak at once on both sides; everybody hears everything, once."""
    alice, bob, room = meet(stage)
    crew = [alice, bob]
    for server in stage.here, stage.there:
        other = stage.person(server, "erin")
        other.joins(room, stage.here)
        crew.append(other)

    def speaks(person):
        return [person.sends(room, f"{person} {number}") for number in range(50)]

    sent = {event for events in at_once(*[lambda it=it: speaks(it) for it in crew]) for event in events}
    for listener in alice, bob:
        def heard():
            told = [event["event_id"] for event in listener.pages(room) if event["type"] == "m.room.message"]
            equal("events that came twice", len(told) - len(set(told)), 0)
            equal(f"events that {listener} lacks", len(sent - set(told)), 0)
            return True

        eventually(f"{listener} heard everything", heard, 60)
    talk(alice, bob, room)
    same_state(room, alice, bob)


def cut(*servers):
    for server in servers:
        server.gate.cut()


def mend(*servers):
    for server in servers:
        server.gate.mend()


def all_heard(listener, room, events):
    for event in events:
        listener.hears(room, event, "what was said while they were apart", RECOVERY_SECONDS_MAX)


@scenario(alone=True)
def partition(stage):
    """Nobody reaches the other for a while, and both go on."""
    alice, bob, room = meet(stage)
    talk(alice, bob, room)
    cut(stage.here, stage.there)
    hers = [alice.sends(room, f"hers {number}") for number in range(5)]
    his = [bob.sends(room, f"his {number}") for number in range(5)]
    time.sleep(4)
    alice.looks()
    equal("heard through a cut", alice.room(room).find(his[0]), None)
    mend(stage.here, stage.there)
    all_heard(bob, room, hers)
    all_heard(alice, room, his)
    talk(alice, bob, room, RECOVERY_SECONDS_MAX)
    same_state(room, alice, bob)


@scenario(alone=True)
def disagreement_across_a_cut(stage):
    """Both sides rule while apart; after that, both have the same state, and it is the stronger one's will."""
    alice, bob, room = meet(stage)
    carol, dave = stage.person(stage.here, "carol"), stage.person(stage.there, "dave")
    carol.joins(room)
    dave.joins(room, stage.here)
    promote(alice, room, bob, level=60)
    alice.sees_membership(room, dave, "join")
    bob.sees_membership(room, carol, "join")
    cut(stage.here, stage.there)
    # Alice bans dave and takes bob's power; bob bans carol; dave renames himself; carol speaks.
    alice.acts("ban", room, dave)
    levels = alice.asks(room, "m.room.power_levels")
    levels["users"][bob.id] = 0
    alice.sets(room, "m.room.power_levels", levels)
    alice.sets(room, "m.room.topic", {"topic": "alice's"})
    carol.sends(room, "carol is here")
    bob.acts("ban", room, carol)
    bob.sets(room, "m.room.topic", {"topic": "bob's"})
    bob.sets(room, "m.room.name", {"name": "bob's"})
    dave.call("PUT", f"/profile/{quote(dave.id)}/displayname", {"displayname": "Dave"})
    time.sleep(2)
    mend(stage.here, stage.there)
    spoken = alice.sends(room, "together again")
    bob.hears(room, spoken, seconds=RECOVERY_SECONDS_MAX)
    alice.hears(room, bob.sends(room, "so it is"), seconds=RECOVERY_SECONDS_MAX)
    state = same_state(room, alice, bob, 40)
    equal("dave", bob.asks(room, "m.room.member", dave.id)["membership"], "ban")
    equal("bob's power", bob.asks(room, "m.room.power_levels")["users"].get(bob.id), 0)
    equal("topic", bob.asks(room, "m.room.topic")["topic"], "alice's")
    if ("m.room.create", "") not in state:
        raise Mismatch("the room has no create event")
    dave.refused(403, "M_FORBIDDEN", "PUT", f"/rooms/{quote(room)}/send/m.room.message/x", {"msgtype": "m.text", "body": "no"})


@scenario(alone=True)
def a_long_silence(stage):
    """A server is stopped while much is said in several rooms, and finds all of it."""
    alice, bob, room = meet(stage)
    other = alice.creates(stage.version)
    bob.joins(other, stage.here)
    bob.sees_own(other, "join")
    stage.there.stop()
    sent = [alice.sends(room, f"unheard {number}") for number in range(70)]
    elsewhere = alice.sends(other, "in the other room")
    alice.sets(room, "m.room.topic", {"topic": "changed meanwhile"})
    alice.call("PUT", f"/sendToDevice/org.example.note/{secrets.token_hex(8)}", {"messages": {bob.id: {bob.device: {"number": 1}}}})
    stage.there.start()
    bob.hears(other, elsewhere, seconds=RECOVERY_SECONDS_MAX)
    bob.hears(room, sent[-1], seconds=RECOVERY_SECONDS_MAX)

    def whole():
        found = [event["event_id"] for event in reversed(bob.pages(room)) if event["type"] == "m.room.message"]
        equal("messages", len(found), len(sent))
        equal("in their order", found, sent)
        return True

    eventually("everything can be read", whole, 40)
    bob.until("the message to the device", lambda it: it.to_device, RECOVERY_SECONDS_MAX)
    equal("messages to the device", [event["content"] for event in bob.to_device], [{"number": 1}])
    talk(alice, bob, room)
    same_state(room, alice, bob)


@scenario(alone=True)
def kicked_across_a_cut(stage):
    """Whoever was put out speaks on without knowing it, and is not heard."""
    alice, bob, room = meet(stage)
    carol, dave = stage.person(stage.here, "carol"), stage.person(stage.there, "dave")
    carol.joins(room)
    dave.joins(room, stage.here)
    alice.sees_membership(room, dave, "join")
    bob.sees_membership(room, carol, "join")
    cut(stage.here, stage.there)
    alice.acts("ban", room, bob)
    gone = alice.sends(room, "to be redacted before anybody there hears it")
    redaction = alice.redacts(room, gone)
    unheard = [bob.sends(room, f"nobody hears this {number}") for number in range(3)]
    heard = [dave.sends(room, f"but this {number}") for number in range(3)]
    time.sleep(2)
    mend(stage.here, stage.there)
    last = alice.sends(room, "together again")
    dave.hears(room, last, seconds=RECOVERY_SECONDS_MAX)
    bob.sees_own(room, "leave", RECOVERY_SECONDS_MAX)
    dave.hears(room, redaction, seconds=RECOVERY_SECONDS_MAX)
    eventually("it is redacted", lambda: dave.event(room, gone)["content"] == {})
    # What was allowed where it was said, and is not any more, is withheld; what was said after it is told.
    all_heard(alice, room, heard)
    alice.looks()
    equal("heard of who was banned", [event for event in unheard if alice.room(room).find(event)], [])
    talk(alice, dave, room, RECOVERY_SECONDS_MAX)
    same_state(room, alice, dave)
    bob.refused(403, "M_FORBIDDEN", "PUT", f"/rooms/{quote(room)}/send/m.room.message/x", {"msgtype": "m.text", "body": "no"})


@scenario(alone=True)
def a_very_long_silence(stage):
    """So much happens while a server is down that it cannot get all of it event by event."""
    alice, bob, room = meet(stage)
    promote(alice, room, bob, level=50)
    stage.there.stop()
    crew = [stage.person(stage.here, f"c{number}") for number in range(4)]
    sent = []
    for number in range(320):
        sent.append(alice.sends(room, f"unheard {number}"))
        if number % 40 == 0:
            alice.sets(room, "org.example.count", {"number": number}, f"key{number % 3}")
            who = crew[number // 40 % len(crew)]
            (who.joins if number < 160 else who.leaves)(room)
    alice.sets(room, "m.room.topic", {"topic": "changed meanwhile"})
    stage.there.start()
    last = alice.sends(room, "is anybody there?")
    bob.hears(room, last, seconds=RECOVERY_SECONDS_MAX)

    def whole():
        found = [event["event_id"] for event in reversed(bob.pages(room)) if event["type"] == "m.room.message"]
        equal("messages that came twice", len(found) - len(set(found)), 0)
        equal("messages that are lacking", len({*sent, last} - set(found)), 0)
        equal("in their order", found, [*sent, last])
        return True

    eventually("everything can be read", whole, 60)
    bob.sets(room, "m.room.topic", {"topic": "by bob"})
    alice.sees_state(room, "m.room.topic", {"topic": "by bob"})
    talk(alice, bob, room)
    same_state(room, alice, bob)


@scenario(alone=True)
def invitation_of_nobody(stage):
    """Who is invited while their server is down is not invited, and the room goes on."""
    alice, bob, room = meet(stage)
    dave = stage.person(stage.there, "dave")
    private = alice.creates(stage.version, preset="private_chat")
    stage.there.stop()
    for place in room, private:
        status, _, _ = alice.request("POST", f"/_matrix/client/v3/rooms/{quote(place)}/invite", {"user_id": dave.id})
        if status == 200:
            raise Mismatch("an invitation of a user whose server is down succeeded")
        alice.refused(404, "M_NOT_FOUND", "GET", f"/rooms/{quote(place)}/state/m.room.member/{quote(dave.id)}")
    stage.there.start()
    talk(alice, bob, room, RECOVERY_SECONDS_MAX)

    def invites():
        status, _, _ = alice.request("POST", f"/_matrix/client/v3/rooms/{quote(private)}/invite", {"user_id": dave.id})
        return status == 200

    eventually("dave can be invited", invites, RECOVERY_SECONDS_MAX)
    dave.sees_own(private, "invite")
    dave.joins(private)
    talk(alice, dave, private)


@scenario(alone=True)
def a_frozen_server(stage):
    """A server takes connections and answers nothing, for a while."""
    alice, bob, room = meet(stage)
    stage.there.freeze()
    sent = [alice.sends(room, f"into the frost {number}") for number in range(5)]
    time.sleep(6)
    stage.there.thaw()
    his = bob.sends(room, "thawed")
    all_heard(bob, room, sent)
    all_heard(alice, room, [his])
    talk(alice, bob, room, RECOVERY_SECONDS_MAX)
    same_state(room, alice, bob)


@scenario(alone=True)
def restart(stage):
    alice, bob, room = meet(stage)
    talk(alice, bob, room)
    for server in stage.here, stage.there:
        server.stop()
        server.start()
        talk(alice, bob, room, RECOVERY_SECONDS_MAX)
    # Without a farewell; what was acknowledged is told after the start.
    for server, speaker, listener in (stage.here, alice, bob), (stage.there, bob, alice):
        said = speaker.sends(room, "the last words before a kill")
        server.kill()
        server.start()
        if server.kind == "synapse":  # which goes on telling with the next event
            speaker.sends(room, "the first words after it")
        listener.hears(room, said, seconds=RECOVERY_SECONDS_MAX)
        talk(alice, bob, room, RECOVERY_SECONDS_MAX)
    dave = stage.person(stage.there, "dave")
    dave.joins(room, stage.here)
    same_state(room, alice, bob)


@scenario(alone=True)
def key_rotation(stage):
    alice, bob, room = meet(stage)
    talk(alice, bob, room)
    stage.here.rotate_key()
    talk(alice, bob, room, RECOVERY_SECONDS_MAX)
    # Who joins now checks events of both keys.
    dave = stage.person(stage.there, "dave")
    dave.joins(room, stage.here)
    talk(alice, dave, room)
    other = alice.creates(stage.version)
    dave.joins(other, stage.here)
    talk(alice, dave, other)
    same_state(room, alice, bob)
