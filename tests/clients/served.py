"""A server of a run's own, and users who ask it by plain HTTP."""

import asyncio
import json
import pathlib
import secrets
import socket
import urllib.error
import urllib.request

from driven import Mismatch

SECONDS_MAX = 20


class Server:
    """Aqueduct, in a directory and on a port of its own."""

    def __init__(self, binary, directory, settings=""):
        """`settings` are further lines of `conduit.toml`, after those of `[limits]`."""
        self.binary, self.directory = binary, pathlib.Path(directory)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        (self.directory / "conduit.toml").write_text(f"""
[server]
name = "localhost:{port}"
data_dir = "{self.directory}/data"
public_base_url = "{self.url}"
[[listener]]
address = "127.0.0.1:{port}"
[registration]
mode = "open"
[limits]
rate_limits = false
{settings}""")

    async def start(self):
        with open(self.directory / "log", "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                self.binary, "--config", str(self.directory / "conduit.toml"), "serve", stdout=log, stderr=log)
        for _ in range(100):
            try:
                await asyncio.to_thread(urllib.request.urlopen, self.url + "/_matrix/client/versions", None, 1)
                return
            except OSError:
                await asyncio.sleep(0.1)
        raise Mismatch("the server did not start")

    async def end(self, by):
        if self.process.returncode is None:
            self.process.send_signal(by)
        try:
            return await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            raise Mismatch(f"the server did not end within 10 seconds of {by.name}") from None

    def log(self):
        return (self.directory / "log").read_text(errors="replace")


class Account:
    """A user who asks by plain HTTP."""

    def __init__(self, server, answer):
        self.server, self.user, self.token = server, answer["user_id"], answer["access_token"]

    @classmethod
    async def register(cls, server, name):
        body = {"username": name, "password": "password", "auth": {"type": "m.login.dummy"}}
        return cls(server, await ask(server, "POST", "v3/register", body))

    async def do(self, method, path, body=None):
        return await ask(self.server, method, path, body, self.token)

    async def create(self, **details):
        return (await self.do("POST", "v3/createRoom", details))["room_id"]

    async def say(self, room, body, **more):
        path = f"v3/rooms/{room}/send/m.room.message/{secrets.token_hex(8)}"
        return (await self.do("PUT", path, {"msgtype": "m.text", "body": body, **more}))["event_id"]


async def ask(server, method, path, body=None, token=None):
    def send():
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        data = json.dumps(body if body is not None else {}).encode() if method != "GET" else None
        request = urllib.request.Request(f"{server.url}/_matrix/client/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS_MAX) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refused:
            raise Mismatch(f"{method} {path}: {refused.code} {refused.read().decode(errors='replace')}") from None

    return await asyncio.to_thread(send)
