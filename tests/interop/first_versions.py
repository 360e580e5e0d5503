"""Has a real Synapse resolve random forks by the first version of state resolution, and sign events of room versions 1 and 2, for tests.

    INTEROP_PYTHON tests/interop/first_versions.py resolutions >src/rooms/resolve/tests/by_another_server.jsonl
    INTEROP_PYTHON tests/interop/first_versions.py events >src/rooms/change/received/signed/by_another_server.jsonl

The Python must have what requirements.txt names. Both outputs are the same at each run.
"""

import asyncio
import json
import random
import sys

import synapse.event_auth as rules  # before synapse.state, which imports it in a circle
from signedjson.key import decode_signing_key_base64
from synapse.api.errors import AuthError, SynapseError
from synapse.api.room_versions import KNOWN_ROOM_VERSIONS, RoomVersions
from synapse.crypto.event_signing import add_hashes_and_signatures, compute_event_reference_hash
from synapse.events import make_event_from_dict
from synapse.state import v1
from unpaddedbase64 import encode_base64

ROOM = "!room:a.example"
ROOMS = 14
USERS = [f"@{name}:{server}.example" for name, server in [("alice", "a"), ("bob", "b"), ("carol", "a"), ("dan", "c"), ("eve", "b")]]


def resolve(states, events):
    """The state that these states resolve to, as maps from (type, state key) to an event's id."""

    async def find(ids):
        return {id: events[id] for id in ids}

    work = v1.resolve_events_with_store(ROOM, RoomVersions.V1, states, None, find)
    return dict(asyncio.new_event_loop().run_until_complete(work))


class Room:
    """A room of version 1 that forks, with the state after each of its events."""

    def __init__(self, chance):
        self.chance, self.order, self.events, self.after = chance, [], {}, {}

    def before(self, prev):
        states = [self.after[id] for id in prev]
        if not states:
            return {}
        if all(state == states[0] for state in states):
            return states[0]
        return resolve(states, self.events)

    def add(self, sender, kind, key, content, prev, must_be_allowed=True):
        before = self.before(prev)
        number = len(self.order)
        event = {
            "auth_events": [], "content": content, "event_id": f"$e{number}x{self.chance.randrange(1000)}:{sender.split(':')[1]}",
            "hashes": {"sha256": "x"}, "origin_server_ts": 1_000 + number, "prev_events": [[id, {"sha256": "x"}] for id in prev],
            "room_id": ROOM, "sender": sender, "signatures": {}, "state_key": key, "type": kind,
            # Servers choose the depth of their events as they like, so that some are the same, and some too low.
            "depth": 1 + max((self.events[id].depth for id in prev), default=0) if self.chance.random() < 0.8 else self.chance.randrange(1, 9),
        }
        wanted = rules.auth_types_for_event(RoomVersions.V1, make_event_from_dict(event, RoomVersions.V1))
        event["auth_events"] = [[before[at], {"sha256": "x"}] for at in sorted(wanted) if at in before]
        made = make_event_from_dict(event, RoomVersions.V1)
        if prev and must_be_allowed:
            try:
                rules.check_state_dependent_auth_rules(made, [self.events[id] for id in before.values()])
            except (AuthError, SynapseError):
                return None
        self.order.append(event)
        self.events[event["event_id"]] = made
        self.after[event["event_id"]] = {**before, (kind, key): event["event_id"]}
        return event["event_id"]

    def begin(self):
        alice = USERS[0]
        joins = {"membership": "join"}
        last = self.add(alice, "m.room.create", "", {"creator": alice}, [])
        for sender, kind, key, content in [
            (alice, "m.room.member", alice, joins),
            (alice, "m.room.power_levels", "", {"users": {alice: 100, USERS[1]: 50}, "state_default": 50, "events": {"m.room.topic": 0}}),
            (alice, "m.room.join_rules", "", {"join_rule": "public"}),
            (USERS[1], "m.room.member", USERS[1], joins),
            (USERS[2], "m.room.member", USERS[2], joins),
        ]:
            last = self.add(sender, kind, key, content, [last])

    def attempt(self):
        chance = self.chance
        ids = [event["event_id"] for event in self.order][5:]
        prev = [chance.choice(ids[-5:] if chance.random() < 0.8 else ids) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        prev = list(dict.fromkeys(prev))
        who, whom, value = chance.choice(USERS), chance.choice(USERS), chance.randrange(100)
        member = lambda membership: {"membership": membership, "displayname": str(value)}
        levels = {USERS[0]: 100, USERS[1]: 50, USERS[2]: chance.choice([0, 50, 100]), USERS[3]: chance.choice([0, 25, "50"])}
        kind, key, content = chance.choice([
            ("m.room.member", who, member("join")), ("m.room.member", who, member("join")), ("m.room.member", who, member("leave")),
            ("m.room.member", whom, member("invite")), ("m.room.member", whom, member("leave")), ("m.room.member", whom, member("ban")),
            ("m.room.power_levels", "", {"users": levels, "state_default": chance.choice([0, 50]), "events": {"m.room.topic": chance.choice([0, 50])}}),
            ("m.room.power_levels", "odd", {"users": levels}),
            ("m.room.join_rules", "", {"join_rule": chance.choice(["public", "invite"])}),
            ("m.room.topic", "", {"topic": value}), ("org.example.thing", str(value % 3), {"is": value}),
            ("m.room.aliases", who.split(":")[1], {"aliases": [f"#{value}:{who.split(':')[1]}"]}),
            ("m.room.third_party_invite", "token", {"display_name": str(value), "public_key": "x", "key_validity_url": "https://x"}),
        ])
        # Some events are forbidden where they stand: a state may have one all the same, by a resolution that let it in.
        self.add(who, kind, key, content, prev, must_be_allowed=chance.random() < 0.9)


def resolutions():
    for seed in range(ROOMS):
        chance = random.Random(seed)
        room = Room(chance)
        room.begin()
        for _ in range(60):
            room.attempt()
        cases = []
        for _ in range(8):
            ids = [event["event_id"] for event in room.order]
            states = [dict(room.after[chance.choice(ids[4:])]) for _ in range(chance.randrange(2, 6))]
            if chance.random() < 0.5:
                # Some states lack some keys.
                for state in states:
                    for at in chance.sample(sorted(state), chance.randrange(0, 3)):
                        del state[at]
            if all(state == states[0] for state in states):
                continue
            resolved = resolve(states, room.events)
            cases.append({"states": [sorted(state.values()) for state in states], "resolved": sorted(resolved.values())})
        print(json.dumps({"events": room.order, "cases": cases}, sort_keys=True, separators=(",", ":")))


def events():
    """Events with hashes and signatures, each with its id and the reference hash by which others cite it."""
    keys = {server: decode_signing_key_base64("ed25519", "k", encode_base64(bytes([number]) * 32)) for number, server in enumerate(["a", "b", "c"], 1)}
    cited = [["$one:a.example", {"sha256": "8dSP/GoQqQ4gOOAQFNuAmZF7/k3mTTfVCFnO/RFjmBQ"}], ["$two:b.example", {"sha256": "x"}]]
    for version in ["1", "2"]:
        for number, (kind, key, content, more) in enumerate([
            ("m.room.create", "", {"creator": USERS[0]}, {"prev_events": [], "auth_events": []}),
            ("m.room.member", USERS[0], {"membership": "join", "displayname": "Ælice \u2028 \"\\"}, {}),
            ("m.room.power_levels", "", {"users": {USERS[0]: "100"}, "invite": 5, "notifications": {"room": 50}}, {}),
            ("m.room.message", None, {"body": "\u0000\u007f\U0001f600", "msgtype": "m.text"}, {}),
            ("m.room.redaction", None, {"reason": "why"}, {"redacts": "$one:a.example"}),
            ("m.room.aliases", "a.example", {"aliases": ["#x:a.example"]}, {}),
            ("m.room.message", None, {"body": "old"}, {"origin": "a.example", "membership": "join", "prev_state": [], "depth": 2**60}),
            # Another server made the id, and signs the event, too.
            ("m.room.topic", "", {"topic": "x"}, {"event_id": "$by another/$%?#&=é\t:b.example"}),
        ]):
            event = {
                "auth_events": cited[:1], "prev_events": cited, "content": content, "depth": 7, "event_id": f"$Own{number}+/_-:a.example",
                "origin_server_ts": 1_700_000_000_000, "room_id": ROOM, "sender": USERS[0], "type": kind, **more,
            }
            if key is not None:
                event["state_key"] = key
            room_version = KNOWN_ROOM_VERSIONS[version]
            for server in ["a", event["event_id"].split(":")[-1].split(".")[0]]:
                add_hashes_and_signatures(room_version, event, f"{server}.example", keys[server])
            made = make_event_from_dict(json.loads(json.dumps(event)), room_version)
            _, hash = compute_event_reference_hash(made)
            print(json.dumps({"version": int(version), "reference_hash": encode_base64(hash), "event": event}, sort_keys=True, separators=(",", ":")))


{"resolutions": resolutions, "events": events}[sys.argv[1]]()
