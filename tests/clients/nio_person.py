"""A person who uses matrix-nio, driven as obey.py says by talk.py, e2ee/ and media/."""

import asyncio
import os
import pathlib
import sys

import nio
from nio.store import SqliteMemoryStore

from obey import Pause, obey, saw, saw_to_device

CONFIG = nio.AsyncClientConfig(store=SqliteMemoryStore, encryption_enabled=True)


class Client(nio.AsyncClient):
    """The library's client, which tells what passes through it, and can be held after a claim of keys."""

    def __init__(self, server, user):
        super().__init__(server, user, config=CONFIG)
        self.pause = Pause()

    async def parse_body(self, transport_response):
        body = await super().parse_body(transport_response)
        if transport_response.url.path.endswith("/sync") and "to_device" in body:
            saw_to_device(body["to_device"]["events"])
        return body

    async def keys_claim(self, user_set):
        answer = await super().keys_claim(user_set)
        await self.pause.here(done(answer).one_time_keys)
        return answer


class Person:
    def __init__(self, server):
        self.server = server
        self.client = None
        self.syncing = None
        self.undecrypted = []

    async def register(self, user, password):
        self.client = Client(self.server, user)
        answer = await self.client.register(user, password, "nio")
        await self.client.close()
        return {"user": done(answer).user_id}

    async def login(self, user, password):
        self.client = Client(self.server, user)
        answer = done(await self.client.login(password, "nio"))
        self.client.add_response_callback(self.news, (nio.SyncResponse, nio.SyncError))
        self.syncing = asyncio.create_task(self.sync())
        return {"user": answer.user_id, "device": answer.device_id}

    async def logout(self):
        self.syncing.cancel()
        done(await self.client.logout())
        await self.client.close()

    async def create_room(self, name, invite=(), encrypted=False):
        state = [nio.EnableEncryptionBuilder().as_dict()] if encrypted else []
        answer = await self.client.room_create(
            name=name, preset=nio.RoomPreset.private_chat, invite=invite, initial_state=state)
        return {"room": done(answer).room_id}

    async def invite(self, room, user):
        done(await self.client.room_invite(room, user))

    async def join(self, room):
        done(await self.client.join(room))

    async def leave(self, room):
        done(await self.client.room_leave(room))

    async def forget(self, room):
        done(await self.client.room_forget(room))

    async def kick(self, room, user, reason):
        done(await self.client.room_kick(room, user, reason))

    async def ban(self, room, user, reason):
        done(await self.client.room_ban(room, user, reason))

    async def unban(self, room, user):
        done(await self.client.room_unban(room, user))

    async def send(self, room, body):
        return await self.event(room, "m.room.message", {"msgtype": "m.text", "body": body})

    async def edit(self, room, event, body):
        content = {
            "msgtype": "m.text",
            "body": f"* {body}",
            "m.new_content": {"msgtype": "m.text", "body": body},
            "m.relates_to": {"rel_type": "m.replace", "event_id": event},
        }
        return await self.event(room, "m.room.message", content)

    async def react(self, room, event, key):
        relation = {"rel_type": "m.annotation", "event_id": event, "key": key}
        return await self.event(room, "m.reaction", {"m.relates_to": relation})

    async def event(self, room, kind, content):
        sent = await self.client.room_send(room, kind, content, ignore_unverified_devices=True)
        return {"event": done(sent).event_id}

    async def redact(self, room, event):
        return {"event": done(await self.client.room_redact(room, event, "no longer so")).event_id}

    async def typing(self, room, on):
        done(await self.client.room_typing(room, on, 20_000))

    async def read(self, room, event):
        done(await self.client.update_receipt_marker(room, event))

    async def set_name(self, room, name):
        done(await self.client.room_put_state(room, "m.room.name", {"name": name}))

    async def set_topic(self, room, topic):
        done(await self.client.room_put_state(room, "m.room.topic", {"topic": topic}))

    async def members(self, room):
        return {"users": sorted(m.user_id for m in done(await self.client.joined_members(room)).members)}

    async def history(self, room):
        """The bodies of all messages one can page back to, oldest first."""
        bodies, start = [], None
        while True:
            page = done(await self.client.room_messages(room, start, limit=7))
            bodies += [e.body for e in page.chunk if isinstance(e, nio.RoomMessageText)]
            if not page.end or not page.chunk:
                return {"bodies": bodies[::-1]}
            start = page.end

    async def upload(self, path, type, name):
        answer, _ = await self.client.upload(lambda *_: path, type, name, filesize=os.path.getsize(path))
        return {"uri": done(answer).content_uri}

    async def download(self, uri, to):
        answer = done(await self.client.download(uri))
        pathlib.Path(to).write_bytes(answer.body)
        return {"type": answer.content_type, "name": answer.filename}

    async def thumbnail(self, uri, width, height, method, to):
        server, media = uri.removeprefix("mxc://").split("/")
        answer = done(await self.client.thumbnail(server, media, width, height, nio.ResizingMethod(method)))
        pathlib.Path(to).write_bytes(answer.body)
        return {"type": answer.content_type}

    async def set_avatar(self, uri):
        done(await self.client.set_avatar(uri))

    async def avatar(self, user):
        return {"uri": done(await self.client.get_avatar(user)).avatar_url}

    async def avatar_in(self, room, user):
        """The avatar by which the member list of a room shows somebody."""
        return {"uri": self.client.rooms[room].avatar_url(user)}

    async def rotate(self, room):
        """The next message gets a new key, which must be shared first."""
        self.client.invalidate_outbound_session(room)

    async def pause(self):
        self.client.pause.open.clear()

    async def go_on(self):
        self.client.pause.open.set()

    async def knows(self, users):
        """The devices for which this client would encrypt."""
        own = self.client.user_id, self.client.device_id
        devices = {user: {it.id for it in self.client.device_store.active_user_devices(user)} for user in users}
        return {user: sorted(ids - {own[1]} if user == own[0] else ids) for user, ids in devices.items()}

    async def shared_with(self, room):
        """The devices that were given the key of the newest messages."""
        return sorted(self.client.olm.outbound_group_sessions[room].users_shared_with)

    async def sync(self):
        try:
            await self.client.sync_forever(timeout=30_000, full_state=True)
        except asyncio.CancelledError:
            raise
        except BaseException as problem:  # nothing the server says may end a client's sync
            saw(kind="broken", problem=repr(problem))

    def news(self, news):
        if isinstance(news, nio.SyncError):
            return saw(kind="broken", problem=repr(news))
        for room, info in news.rooms.invite.items():
            inviter = next(e.sender for e in info.invite_state if isinstance(e, nio.InviteMemberEvent)
                           and e.state_key == self.client.user_id)
            saw(kind="mine", room=room, membership="invite", sender=inviter)
        for room, info in (news.rooms.join | news.rooms.leave).items():
            self.room_news(room, info)
        # What could not be read when it came may have been waiting for its key.
        waiting, self.undecrypted = self.undecrypted, []
        for event in waiting:
            self.event_news(event.room_id, event)

    def room_news(self, room, info):
        for event in info.state + info.timeline.events:
            self.event_news(room, event)
        for event in getattr(info, "ephemeral", []):
            if isinstance(event, nio.TypingNoticeEvent):
                saw(kind="typing", room=room, users=sorted(event.users))
            elif isinstance(event, nio.ReceiptEvent):
                for receipt in event.receipts:
                    saw(kind="receipt", room=room, user=receipt.user_id, event=receipt.event_id)

    def event_news(self, room, event):
        source = event.source
        seen = {"room": room, "sender": event.sender}
        match event:
            case nio.MegolmEvent():
                try:
                    self.event_news(room, self.client.decrypt_event(event))
                except nio.EncryptionError as problem:
                    saw(kind="undecrypted", **seen, event=event.event_id, problem=str(problem))
                    self.undecrypted.append(event)
            case nio.BadEvent():
                saw(kind="broken", problem=f"an event that nio cannot read: {source}")
            case nio.RoomMessageText():
                relation = source["content"].get("m.relates_to", {})
                if relation.get("rel_type") == "m.replace":
                    new = source["content"]["m.new_content"]["body"]
                    saw(kind="edit", **seen, of=relation["event_id"], body=new)
                else:
                    saw(kind="message", **seen, event=event.event_id, body=event.body, encrypted=event.decrypted)
            case nio.ReactionEvent():
                saw(kind="reaction", **seen, to=event.reacts_to, key=event.key)
            case nio.RedactionEvent():
                saw(kind="redaction", **seen, of=event.redacts)
            case nio.RoomNameEvent():
                saw(kind="name", room=room, name=self.client.rooms[room].name)
            case nio.RoomTopicEvent():
                saw(kind="topic", room=room, topic=self.client.rooms[room].topic)
            case nio.RoomMemberEvent() if event.state_key == self.client.user_id:
                saw(kind="mine", **seen, membership=event.membership)
            case nio.RoomMemberEvent():
                saw(kind="member", **seen, user=event.state_key, membership=event.membership)


def done(answer):
    if isinstance(answer, nio.ErrorResponse):
        raise Refused(f"{answer.status_code} {answer.message}")
    return answer


class Refused(Exception):
    pass


async def main(server):
    person = Person(server)
    await obey(person)
    if person.client:
        await person.client.close()


asyncio.run(main(sys.argv[1]))
