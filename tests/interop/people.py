"""A person with an account: plain calls of the client-server API, and all that /sync has told so far."""

import http.client
import json
import os
import secrets
import threading
import time
import urllib.parse

# On a busy machine every bound may be this many times as long.
PATIENCE = float(os.environ.get("INTEROP_PATIENCE", "1"))
SECONDS_MAX = 20
# A call that makes its server wait for a silent one may take long, and still must end.
CALL_SECONDS_MAX = 90 * PATIENCE


class Mismatch(Exception):
    """What came is not what the scenario demands."""


class Refused(Mismatch):
    """A call was answered with an error."""

    def __init__(self, what, status, answer):
        self.status = status
        self.code = answer.get("errcode") if isinstance(answer, dict) else None
        super().__init__(f"{what} was answered with {status}: {json.dumps(answer)[:600]}")


def quote(part):
    return urllib.parse.quote(part, safe="")


def equal(what, found, wanted):
    if found != wanted:
        raise Mismatch(f"{what}: {found!r}, not {wanted!r}")


def eventually(what, check, seconds=SECONDS_MAX):
    """Asks until the answer is true; returns it. The check may also raise Mismatch to say what is still wrong."""
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while True:
        why = ""
        try:
            if found := check():
                return found
        except Mismatch as mismatch:
            why = f": {mismatch}"
        if time.monotonic() > end:
            raise Mismatch(f"within {seconds} s it was not so that {what}{why}")
        time.sleep(0.3)


class Room:
    """What /sync told about a room."""

    def __init__(self):
        self.membership = None
        self.timeline = []
        self.state = {}
        self.stripped = {}
        self.typing = set()
        self.receipts = {}

    def find(self, event_id):
        return next((event for event in self.timeline if event["event_id"] == event_id), None)

    def content(self, kind, key=""):
        return self.state.get((kind, key), {}).get("content")


class Person:
    def __init__(self, server, name):
        self.server = server
        self.local = threading.local()
        self.since = None
        self.rooms = {}
        self.presence = {}
        self.to_device = []
        self.changed_devices = set()
        self.left_devices = set()
        self.password = secrets.token_hex(8)
        self.token = None
        answer = self.call("POST", "/register", {
            "username": f"{name}-{secrets.token_hex(4)}", "password": self.password,
            "auth": {"type": "m.login.dummy"}, "initial_device_display_name": f"{name}'s device"})
        self.id, self.token, self.device = answer["user_id"], answer["access_token"], answer["device_id"]

    def __str__(self):
        return f"{self.id.split('-')[0]} of {self.server}"

    # Calls

    def request(self, method, path, body=None, headers=()):
        """One request, repeated once when a connection kept from before is gone. Returns status, headers and bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **dict(headers)}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        for attempt in range(2):
            kept = getattr(self.local, "connection", None)
            if kept is None:
                kept = self.local.connection = http.client.HTTPConnection(
                    "127.0.0.1", self.server.client_port, timeout=CALL_SECONDS_MAX)
                attempt = 1
            try:
                kept.request(method, path, data, headers)
                answer = kept.getresponse()
                return answer.status, answer.headers, answer.read()
            except (OSError, http.client.HTTPException) as error:
                kept.close()
                self.local.connection = None
                if attempt == 1:
                    raise Mismatch(f"{method} {path.split('?')[0]} at {self.server}: {error!r}") from error

    def call(self, method, path, body=None, query=None):
        """A call of the client-server API that must succeed; `path` is below /_matrix/client/v3 unless it says otherwise."""
        path = path if path.startswith("/_matrix/") else f"/_matrix/client/v3{path}"
        if query:
            path += "?" + urllib.parse.urlencode(query, doseq=True)
        if body is None and method in ("POST", "PUT"):
            body = {}
        status, _, data = self.request(method, path, body)
        try:
            answer = json.loads(data)
        except ValueError:
            answer = {"text": data.decode(errors="replace")[:300]}
        if status != 200:
            raise Refused(f"{method} {path.split('?')[0]} at {self.server}", status, answer)
        return answer

    def refused(self, status, code, method, path, body=None, query=None):
        """A call that must be refused; `status` and `code` may be several."""
        try:
            answer = self.call(method, path, body, query)
        except Refused as refused:
            codes = (code,) if isinstance(code, str) else code
            statuses = (status,) if isinstance(status, int) else status
            if refused.status in statuses and refused.code in codes:
                return
            raise Mismatch(f"{refused}, not with {status} {'/'.join(codes)}") from None
        raise Mismatch(f"{method} {path} at {self.server} was not refused with {status} {code}: {json.dumps(answer)[:300]}")

    # Rooms

    def creates(self, version, **options):
        options = {"preset": "public_chat", "room_version": version, **options}
        room = self.call("POST", "/createRoom", options)["room_id"]
        return room

    def joins(self, room, via=None):
        query = [(key, via.name) for key in ("server_name", "via")] if via else None
        return self.call("POST", f"/join/{quote(room)}", {}, query)["room_id"]

    def knocks(self, room, via, reason=None):
        query = [(key, via.name) for key in ("server_name", "via")]
        return self.call("POST", f"/knock/{quote(room)}", {"reason": reason} if reason else {}, query)["room_id"]

    def leaves(self, room, **body):
        self.call("POST", f"/rooms/{quote(room)}/leave", body)

    def acts(self, action, room, other, **body):
        """Invites, kicks, bans or unbans somebody."""
        self.call("POST", f"/rooms/{quote(room)}/{action}", {"user_id": other.id, **body})

    def sends(self, room, content, kind="m.room.message"):
        if isinstance(content, str):
            content = {"msgtype": "m.text", "body": content}
        path = f"/rooms/{quote(room)}/send/{quote(kind)}/{secrets.token_hex(8)}"
        return self.call("PUT", path, content)["event_id"]

    def sets(self, room, kind, content, key=""):
        return self.call("PUT", f"/rooms/{quote(room)}/state/{quote(kind)}/{quote(key)}", content)["event_id"]

    def redacts(self, room, event, **body):
        path = f"/rooms/{quote(room)}/redact/{quote(event)}/{secrets.token_hex(8)}"
        return self.call("PUT", path, body)["event_id"]

    def asks(self, room, kind, key=""):
        return self.call("GET", f"/rooms/{quote(room)}/state/{quote(kind)}/{quote(key)}")

    def event(self, room, event):
        return self.call("GET", f"/rooms/{quote(room)}/event/{quote(event)}")

    def state(self, room):
        """The current state: the event's id for each type and key."""
        events = self.call("GET", f"/rooms/{quote(room)}/state")
        return {(event["type"], event["state_key"]): event["event_id"] for event in events}

    def pages(self, room, limit=50, **query):
        """All that the room's past holds for this person, newest first."""
        found, start = [], None
        for _ in range(200):
            asked = {"dir": "b", "limit": limit, **query, **({"from": start} if start else {})}
            page = self.call("GET", f"/rooms/{quote(room)}/messages", query=asked)
            found += page["chunk"]
            if not page.get("end") or page["end"] == start:
                break
            start = page["end"]
        return found

    # Sync

    def looks(self, timeout_ms=0):
        query = {"timeout": timeout_ms, "filter": json.dumps({"room": {"timeline": {"limit": 100}}})}
        if self.since:
            query["since"] = self.since
        news = self.call("GET", "/sync", query=query)
        self.since = news["next_batch"]
        rooms = news.get("rooms", {})
        for section, membership in ("join", "join"), ("leave", "leave"), ("invite", "invite"), ("knock", "knock"):
            for room_id, told in rooms.get(section, {}).items():
                room = self.rooms.setdefault(room_id, Room())
                room.membership = membership
                self.take_in(room, told)
        for event in news.get("presence", {}).get("events", []):
            self.presence[event["sender"]] = event["content"]
        self.to_device += news.get("to_device", {}).get("events", [])
        self.changed_devices.update(news.get("device_lists", {}).get("changed", []))
        self.left_devices.update(news.get("device_lists", {}).get("left", []))

    def take_in(self, room, told):
        for section in "invite_state", "knock_state":
            for event in told.get(section, {}).get("events", []):
                room.stripped[event["type"], event["state_key"]] = event
        timeline = told.get("timeline", {}).get("events", [])
        for event in told.get("state", {}).get("events", []) + timeline:
            if "state_key" in event:
                room.state[event["type"], event["state_key"]] = event
        room.timeline += timeline
        for event in told.get("ephemeral", {}).get("events", []):
            if event["type"] == "m.typing":
                room.typing = set(event["content"]["user_ids"])
            if event["type"] == "m.receipt":
                for event_id, kinds in event["content"].items():
                    for kind, users in kinds.items():
                        for user, details in users.items():
                            room.receipts[user, kind, details.get("thread_id")] = event_id

    def until(self, what, check, seconds=SECONDS_MAX):
        """Polls /sync until the check is true of what was told; returns its answer."""
        seconds *= PATIENCE
        end = time.monotonic() + seconds
        while True:
            if found := check(self):
                return found
            left = end - time.monotonic()
            if left <= 0:
                raise Mismatch(f"{self} did not see within {seconds} s that {what}")
            self.looks(int(min(left, 5) * 1000))

    def room(self, room):
        return self.rooms.setdefault(room, Room())

    def hears(self, room, event_id, what="the event", seconds=SECONDS_MAX):
        """Waits until an event was told, and returns it."""
        return self.until(f"{what} ({event_id}) came", lambda it: it.room(room).find(event_id), seconds)

    def sees_membership(self, room, other, membership, seconds=SECONDS_MAX):
        self.until(
            f"{other} has the membership {membership}",
            lambda it: (it.room(room).content("m.room.member", other.id) or {}).get("membership") == membership, seconds)

    def knows_membership(self, room, other, membership):
        """Waits for the state alone: Synapse doesn't tell by /sync what it got as an invitation before it came by the room."""
        eventually(f"{self} knows that {other} has the membership {membership}", lambda: (
            self.asks(room, "m.room.member", other.id)["membership"] == membership))

    def sees_own(self, room, membership, seconds=SECONDS_MAX):
        """Waits for a room to stand in this section of /sync."""
        return self.until(
            f"the room {room} is among those of {membership}",
            lambda it: it.room(room).membership == membership and it.room(room), seconds)

    def sees_state(self, room, kind, content, key="", seconds=SECONDS_MAX):
        self.until(f"{kind} is {content}", lambda it: it.room(room).content(kind, key) == content, seconds)


def same_state(room, one, other, seconds=SECONDS_MAX):
    """Waits until two people of different servers are told the same state."""

    def check():
        left, right = one.state(room), other.state(room)
        if left == right:
            return left
        differing = {key: (left.get(key), right.get(key)) for key in left.keys() | right.keys()
                     if left.get(key) != right.get(key)}
        raise Mismatch(f"these differ between {one} and {other}: {differing}")

    return eventually(f"{one} and {other} have the same state", check, seconds)
