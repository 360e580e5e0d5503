"""A person who uses matrix-nio, driven by talk.py.

Commands come in as lines of JSON, {"id": 1, "do": "send", ..}; each is answered with {"id": 1, "result": ..} or
{"id": 1, "error": ..}. What the person sees through sync goes out as {"saw": {"kind": "message", ..}}: the kinds and their
fields are those of js_person.mjs.
"""

import asyncio
import json
import sys

import nio


class Person:
    def __init__(self, server):
        self.server = server
        self.client = None
        self.syncing = None

    async def register(self, user, password):
        self.client = nio.AsyncClient(self.server, user)
        answer = await self.client.register(user, password, "nio")
        await self.client.close()
        return {"user": done(answer).user_id}

    async def login(self, user, password):
        self.client = nio.AsyncClient(self.server, user)
        answer = done(await self.client.login(password, "nio"))
        self.syncing = asyncio.create_task(self.sync())
        return {"user": answer.user_id, "device": answer.device_id}

    async def logout(self):
        self.syncing.cancel()
        done(await self.client.logout())
        await self.client.close()

    async def create_room(self, name):
        answer = await self.client.room_create(name=name, preset=nio.RoomPreset.private_chat)
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
        return {"event": done(await self.client.room_send(room, kind, content)).event_id}

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

    async def sync(self):
        try:
            while True:
                news = done(await self.client.sync(timeout=30_000, full_state=self.client.next_batch is None))
                for room, info in news.rooms.invite.items():
                    inviter = next(e.sender for e in info.invite_state if isinstance(e, nio.InviteMemberEvent)
                                   and e.state_key == self.client.user_id)
                    saw(kind="mine", room=room, membership="invite", sender=inviter)
                for room, info in news.rooms.join.items():
                    self.room_news(room, info)
                for room, info in news.rooms.leave.items():
                    self.room_news(room, info)
        except asyncio.CancelledError:
            raise
        except BaseException as problem:  # nothing the server says may end a client's sync
            saw(kind="broken", problem=repr(problem))

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
            case nio.BadEvent():
                saw(kind="broken", problem=f"an event that nio cannot read: {source}")
            case nio.RoomMessageText():
                relation = source["content"].get("m.relates_to", {})
                if relation.get("rel_type") == "m.replace":
                    new = source["content"]["m.new_content"]["body"]
                    saw(kind="edit", **seen, of=relation["event_id"], body=new)
                else:
                    saw(kind="message", **seen, event=event.event_id, body=event.body)
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


def tell(line):
    print(json.dumps(line), flush=True)


def saw(**what):
    tell({"saw": what})


async def obey(person, command):
    number, verb = command.pop("id"), command.pop("do")
    try:
        tell({"id": number, "result": await getattr(person, verb)(**command)})
    except Exception as problem:
        tell({"id": number, "error": str(problem) or repr(problem)})


async def main(server):
    person = Person(server)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        await obey(person, json.loads(line))
    if person.client:
        await person.client.close()


asyncio.run(main(sys.argv[1]))
