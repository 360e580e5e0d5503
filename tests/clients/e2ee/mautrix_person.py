"""A person who uses mautrix, which encrypts with libolm, driven as obey.py says. It knows as much as e2ee.py asks of it."""

import asyncio
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from mautrix.api import HTTPAPI, Method, Path
from mautrix.client import Client, DecryptionDispatcher, InternalEventType, MemoryStateStore
from mautrix.crypto import MemoryCryptoStore, OlmMachine, StateStore
from mautrix.errors import DecryptionError, SessionNotFound
from mautrix.types import EventType, RoomCreatePreset, TOFUSigningKey

from obey import Pause, obey, saw, saw_to_device

# A key may come after what it encrypts, as long as a server takes to catch up.
KEY_SECONDS_MAX = 120


class Rooms(MemoryStateStore, StateStore):
    async def find_shared_rooms(self, user):
        return [room for room, members in self.members.items() if user in members and room in self.encryption]


class Keys(MemoryCryptoStore):
    async def put_cross_signing_key(self, user, usage, key):
        """The library's own fails when a key comes again, because what it changes cannot be changed."""
        keys = self._cross_signing_keys.setdefault(user, {})
        keys[usage] = TOFUSigningKey(key=key, first=keys[usage].first if usage in keys else key)


class Reader(DecryptionDispatcher):
    """Tells what is decrypted, once its key is there."""

    async def handle(self, event):
        seen = {"room": event.room_id, "sender": event.sender, "event": event.event_id}
        machine = self.client.crypto
        try:
            try:
                plain = await machine.decrypt_megolm_event(event)
            except SessionNotFound as problem:
                saw(kind="undecrypted", **seen, problem=str(problem))
                await machine.wait_for_session(event.room_id, event.content.session_id, KEY_SECONDS_MAX)
                plain = await machine.decrypt_megolm_event(event)
        except DecryptionError as problem:
            saw(kind="undecrypted", **seen, problem=str(problem))
        else:
            if plain.type == EventType.ROOM_MESSAGE:
                saw(kind="message", **seen, body=plain.content.body, encrypted=True)


class Person:
    def __init__(self, server):
        rooms, keys = Rooms(), Keys("account", "pickle key")
        api = HTTPAPI(server, default_retry_count=4)
        self.client = Client(api=api, sync_store=keys, state_store=rooms)
        self.machine = OlmMachine(self.client, keys, rooms)
        self.pause_at_claim = Pause()
        self.claim_keys = self.client.claim_keys
        self.client.claim_keys = self.claim

    async def register(self, user, password):
        body = {"username": user, "password": password, "auth": {"type": "m.login.dummy"}}
        return {"user": (await self.client.api.request(Method.POST, Path.v3.register, body))["user_id"]}

    async def login(self, user, password):
        answer = await self.client.login(identifier=user, password=password, device_name="mautrix")
        await self.machine.load()
        self.client.crypto = self.machine
        self.client.remove_dispatcher(DecryptionDispatcher)
        self.client.add_dispatcher(Reader)
        self.client.add_event_handler(EventType.ROOM_MEMBER, self.member_news)
        self.client.add_event_handler(InternalEventType.SYNC_SUCCESSFUL, self.sync_news, wait_sync=True)
        self.client.start(None)
        return {"user": answer.user_id, "device": answer.device_id}

    async def logout(self):
        self.client.stop()
        await self.client.logout()

    async def create_room(self, name, invite=(), encrypted=False):
        state = [{"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}]
        room = await self.client.create_room(
            name=name, preset=RoomCreatePreset.PRIVATE, invitees=list(invite), initial_state=state if encrypted else [])
        return {"room": room}

    async def invite(self, room, user):
        await self.client.invite_user(room, user)

    async def join(self, room):
        await self.client.join_room(room)

    async def leave(self, room):
        await self.client.leave_room(room)

    async def send(self, room, body):
        return {"event": await self.client.send_text(room, body)}

    async def rotate(self, room):
        """The next message gets a new key, which must be shared first."""
        await self.machine.crypto_store.remove_outbound_group_session(room)

    async def pause(self):
        self.pause_at_claim.open.clear()

    async def go_on(self):
        self.pause_at_claim.open.set()

    async def claim(self, users):
        answer = await self.claim_keys(users)
        await self.pause_at_claim.here(answer.one_time_keys)
        return answer

    async def knows(self, users):
        """The devices for which this client would encrypt. It asks for those of a user once, and follows changes from then on."""
        store = self.machine.crypto_store
        known = {}
        for user in users:
            async with self.machine._fetch_keys_lock:
                if await store.get_devices(user) is None:
                    await self.machine._fetch_keys([user], include_untracked=True)
            ids = (await store.get_devices(user) or {}).keys()
            known[user] = sorted(ids - {self.client.device_id} if user == self.client.mxid else ids)
        return known

    async def shared_with(self, room):
        """The devices that were given the key of the newest messages."""
        return sorted((await self.machine.crypto_store.get_outbound_group_session(room)).users_shared_with)

    async def sign_devices(self, password):
        """Makes keys for cross-signing, which sign this device, and leaves them in secret storage."""
        return {"recovery_key": await self.machine.generate_recovery_key()}

    async def recover(self, recovery_key):
        """Signs this device with the key from secret storage."""
        await self.machine.verify_with_recovery_key(recovery_key)

    async def trust(self, user, device):
        identity = await self.machine.crypto_store.get_device(user, device)
        return identity and str(await self.machine.resolve_trust(identity))

    async def sync_news(self, data):
        saw_to_device(data["data"].get("to_device", {}).get("events", []))

    async def member_news(self, event):
        seen = {"room": event.room_id, "sender": event.sender, "membership": str(event.content.membership)}
        if event.state_key == self.client.mxid:
            saw(kind="mine", **seen)
        else:
            saw(kind="member", **seen, user=event.state_key)


async def main(server):
    person = Person(server)
    await obey(person)
    person.client.stop()
    await person.client.api.session.close()


asyncio.run(main(sys.argv[1]))
