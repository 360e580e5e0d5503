"""Scenarios of devices and their keys: what one server tells another of them, and when.

The roles are those of scenarios.py.
"""

import canonicaljson
import nacl.signing
import unpaddedbase64

from people import equal, eventually
from scenarios import RECOVERY_SECONDS_MAX, meet, scenario, talk


class Keys:
    """Keys of a device or of cross-signing, made as a client makes them."""

    def __init__(self):
        self.signing = nacl.signing.SigningKey.generate()
        self.public = self.text(bytes(self.signing.verify_key))

    @staticmethod
    def text(data):
        return unpaddedbase64.encode_base64(data)

    def sign(self, user, key_id, content):
        signature = self.text(self.signing.sign(canonicaljson.encode_canonical_json(content)).signature)
        signatures = {user: {f"ed25519:{key_id}": signature}}
        return {**content, "signatures": signatures}


def upload_device(person):
    keys = Keys()
    device = keys.sign(person.id, person.device, {
        "user_id": person.id, "device_id": person.device,
        "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
        "keys": {f"ed25519:{person.device}": keys.public, f"curve25519:{person.device}": Keys().public}})
    once = keys.sign(person.id, person.device, {"key": Keys().public})
    spare = keys.sign(person.id, person.device, {"key": Keys().public, "fallback": True})
    person.keys = keys
    person.call("POST", "/keys/upload", {
        "device_keys": device, "one_time_keys": {"signed_curve25519:AAAA": once},
        "fallback_keys": {"signed_curve25519:SPARE": spare}})
    return device, once, spare


def query(asker, *people):
    answer = asker.call("POST", "/keys/query", {"device_keys": {person.id: [] for person in people}, "timeout": 10000})
    equal("failures", answer.get("failures", {}), {})
    return answer


def key_of(told, usage, person):
    """The cross-signing key in an answer about keys; None while there is none."""
    return told.get(f"{usage}_keys", {}).get(person.id, {}).get("keys")


@scenario()
def device_lists_and_keys(stage):
    alice, bob, room = meet(stage, initial_state=[
        {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}])
    for one, other in (alice, bob), (bob, alice):
        other.looks()
        other.changed_devices.clear()
        device, once, spare = upload_device(one)
        other.until("the devices changed", lambda it: one.id in it.changed_devices)

        def first():
            told = query(other, one)["device_keys"].get(one.id, {}).get(one.device, {})
            equal("keys of the device", told.get("keys"), device["keys"])
            equal("signatures", told.get("signatures"), device["signatures"])
            return True

        eventually("the device's keys are told", first)
        for wanted in once, spare, spare:
            claimed = other.call("POST", "/keys/claim", {"one_time_keys": {one.id: {one.device: "signed_curve25519"}}})
            equal("failures", claimed.get("failures", {}), {})
            equal("claimed", list(claimed["one_time_keys"][one.id][one.device].values()), [wanted])

        # Cross-signing keys.
        other.changed_devices.clear()
        master, own = Keys(), Keys()
        master_key = {"user_id": one.id, "usage": ["master"], "keys": {f"ed25519:{master.public}": master.public}}
        own_key = master.sign(one.id, master.public, {
            "user_id": one.id, "usage": ["self_signing"], "keys": {f"ed25519:{own.public}": own.public}})
        one.call("POST", "/keys/device_signing/upload", {"master_key": master_key, "self_signing_key": own_key, "auth": {
            "type": "m.login.password", "password": one.password, "identifier": {"type": "m.id.user", "user": one.id}}})
        other.until("the cross-signing keys changed", lambda it: one.id in it.changed_devices)

        def signed():
            told = query(other, one)
            equal("master key", key_of(told, "master", one), master_key["keys"])
            equal("own key", key_of(told, "self_signing", one), own_key["keys"])
            return True

        eventually("the cross-signing keys are told", signed)

        # A device that goes.
        login = one.call("POST", "/login", {"type": "m.login.password", "password": one.password,
                                            "identifier": {"type": "m.id.user", "user": one.id}})
        other.changed_devices.clear()
        token, one.token = one.token, login["access_token"]
        name, one.device = one.device, login["device_id"]
        upload_device(one)
        other.until("there is another device", lambda it: one.id in it.changed_devices)
        eventually("both devices are told", lambda: set(query(other, one)["device_keys"][one.id]) == {name, one.device})
        other.changed_devices.clear()
        one.call("POST", "/logout", {})
        one.token, one.device = token, name
        other.until("a device is gone", lambda it: one.id in it.changed_devices)
        eventually("one device is told", lambda: set(query(other, one)["device_keys"][one.id]) == {name})
    # Who shares no room any more.
    talk(alice, bob, room)
    bob.leaves(room)
    alice.until("bob's devices are no longer followed", lambda it: bob.id in it.left_devices)


def unsigned(key):
    return {field: value for field, value in key.items() if field != "signatures"}


class CrossSigning:
    """The three keys of a user, uploaded."""

    def __init__(self, person):
        self.master, self.own, self.others = Keys(), Keys(), Keys()
        self.master_key = self._describe(person, "master", self.master)
        self.own_key = self.master.sign(person.id, self.master.public, self._describe(person, "self_signing", self.own))
        self.others_key = self.master.sign(person.id, self.master.public, self._describe(person, "user_signing", self.others))
        person.call("POST", "/keys/device_signing/upload", {
            "master_key": self.master_key, "self_signing_key": self.own_key, "user_signing_key": self.others_key,
            "auth": {"type": "m.login.password", "password": person.password, "identifier": {"type": "m.id.user", "user": person.id}}})

    @staticmethod
    def _describe(person, usage, keys):
        return {"user_id": person.id, "usage": [usage], "keys": {f"ed25519:{keys.public}": keys.public}}


def upload_signature(person, user, key_id, signed):
    answer = person.call("POST", "/keys/signatures/upload", {user.id: {key_id: signed}})
    equal("failures", answer.get("failures", {}), {})


def signers(key, user):
    return set(key.get("signatures", {}).get(user.id, {}))


@scenario()
def signatures_of_keys(stage):
    """Whoever verifies a device, or another user, is believed where that may be seen, and only there."""
    alice, bob, _ = meet(stage)
    crossed = {}
    for one, other in (alice, bob), (bob, alice):
        device, _, _ = upload_device(one)
        keys = crossed[one] = CrossSigning(one)
        other.until("the cross-signing keys changed", lambda it: one.id in it.changed_devices)
        other.changed_devices.clear()
        # The device is signed by its owner's self-signing key, and signs the master key.
        upload_signature(one, one, one.device, keys.own.sign(one.id, keys.own.public, unsigned(device)))
        other.until("the device's signatures changed", lambda it: one.id in it.changed_devices)
        upload_signature(one, one, keys.master.public, one.keys.sign(one.id, one.device, unsigned(keys.master_key)))

        def signed():
            told = query(other, one)
            equal("signatures of the device", signers(told["device_keys"].get(one.id, {}).get(one.device, {}), one),
                  {f"ed25519:{one.device}", f"ed25519:{keys.own.public}"})
            own = told.get("self_signing_keys", {}).get(one.id, {})
            equal("signatures of the self-signing key", signers(own, one), {f"ed25519:{keys.master.public}"})
            equal("user-signing keys of others", told.get("user_signing_keys", {}).get(one.id), None)
            return True

        eventually("the device's signatures are told", signed)
        equal("the own user-signing key", query(one, one)["user_signing_keys"][one.id]["keys"], keys.others_key["keys"])

    for one, other in (alice, bob), (bob, alice):
        keys = crossed[one].others
        theirs = query(one, other)["master_keys"][other.id]
        upload_signature(one, other, crossed[other].master.public, keys.sign(one.id, keys.public, unsigned(theirs)))
        eventually("the signature of another user's key is kept", lambda: (
            f"ed25519:{keys.public}" in signers(query(one, other)["master_keys"][other.id], one)))
    for one, other in (alice, bob), (bob, alice):
        equal("who else sees that another user verified them", signers(query(one, one)["master_keys"][one.id], other), set())


@scenario()
def new_cross_signing_keys(stage):
    """Whoever lost their keys makes new ones, and what the old ones signed counts no more."""
    alice, bob, _ = meet(stage)
    for one, other in (alice, bob), (bob, alice):
        device, _, _ = upload_device(one)
        old = CrossSigning(one)
        upload_signature(one, one, one.device, old.own.sign(one.id, old.own.public, unsigned(device)))
        eventually("the old keys are told", lambda: (
            key_of(query(other, one), "self_signing", one) == old.own_key["keys"]))
        other.looks()
        other.changed_devices.clear()
        new = CrossSigning(one)
        other.until("the keys changed", lambda it: one.id in it.changed_devices)

        def replaced():
            told = query(other, one)
            equal("master key", key_of(told, "master", one), new.master_key["keys"])
            equal("self-signing key", key_of(told, "self_signing", one), new.own_key["keys"])
            return True

        eventually("the new keys are told", replaced)


@scenario(alone=True)
def devices_change_in_silence(stage):
    """A server is stopped while devices come and go elsewhere, and tells its users of it afterwards."""
    alice, bob, room = meet(stage)
    upload_device(alice)
    first = alice.device
    eventually("the first device is told", lambda: set(query(bob, alice)["device_keys"].get(alice.id, {})) == {first})
    bob.looks()
    bob.changed_devices.clear()
    stage.there.stop()
    token, wanted = alice.token, {first}
    for number in range(6):
        login = alice.call("POST", "/login", {"type": "m.login.password", "password": alice.password,
                                              "identifier": {"type": "m.id.user", "user": alice.id}})
        alice.token, alice.device = login["access_token"], login["device_id"]
        upload_device(alice)
        if number % 2:
            alice.call("POST", "/logout", {})
        else:
            wanted.add(alice.device)
        alice.token, alice.device = token, first
    keys = CrossSigning(alice)
    stage.there.start()
    bob.hears(room, alice.sends(room, "new devices"), seconds=RECOVERY_SECONDS_MAX)
    bob.until("alice's devices changed", lambda it: alice.id in it.changed_devices, RECOVERY_SECONDS_MAX)

    def current():
        told = query(bob, alice)
        equal("devices", set(told["device_keys"].get(alice.id, {})), wanted)
        equal("master key", key_of(told, "master", alice), keys.master_key["keys"])
        return True

    eventually("the devices are told", current, RECOVERY_SECONDS_MAX)
    talk(alice, bob, room)


@scenario()
def an_account_ends(stage):
    """Whoever deactivates their account leaves rooms, invitations and device lists on both servers."""
    for here, there in (stage.here, stage.there), (stage.there, stage.here):
        alice, bob = stage.person(here), stage.person(there, "bob")
        room = alice.creates(stage.version)
        private = alice.creates(stage.version, preset="private_chat", invite=[bob.id])
        bob.sees_own(private, "invite")
        bob.joins(room, here)
        alice.sees_membership(room, bob, "join")
        upload_device(bob)
        eventually("bob's device is told", lambda: query(alice, bob)["device_keys"].get(bob.id))
        bob.call("POST", "/account/deactivate", {"auth": {
            "type": "m.login.password", "password": bob.password, "identifier": {"type": "m.id.user", "user": bob.id}}})
        for place in room, private:
            alice.sees_membership(place, bob, "leave")
        eventually("bob has no devices any more", lambda: not query(alice, bob)["device_keys"].get(bob.id))
