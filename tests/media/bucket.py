"""Files of a real server in a bucket of a real S3-compatible store, both on loopback.

    bucket.py AQUEDUCT MOTO_SERVER

Uploads, downloads, parts, thumbnails, redirects, moving there and back; the store is frozen and the server killed on the way. Fails on
the first file that is not what it should be.
"""

import hashlib
import http.client
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib

BUCKET = "files"


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def ask(port, method, path, body=None, headers=(), token=None, timeout=180):
    """Asks once, follows nothing, and answers status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    fields = dict(headers)
    if token:
        fields["Authorization"] = f"Bearer {token}"
    try:
        connection.request(method, path, body=body, headers=fields)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def until(what, is_so, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if is_so():
                return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"{what}: it did not come about within {seconds} seconds")


def equal(what, found, expected):
    if found != expected:
        sys.exit(f"{what}: {found!r}, and not {expected!r}")


class Store:
    """The S3-compatible store."""

    def __init__(self, program, folder):
        self.port = free_port()
        log = open(folder / "store.log", "wb")
        self.process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(self.port)], stdout=log, stderr=log
        )
        until("the store starts", lambda: ask(self.port, "GET", "/")[0] == 200)
        equal("making the bucket", ask(self.port, "PUT", f"/{BUCKET}")[0], 200)

    def names(self):
        """The names of all objects."""
        found, after = [], ""
        while True:
            query = urllib.parse.urlencode({"list-type": "2", "start-after": after})
            status, _, body = ask(self.port, "GET", f"/{BUCKET}?{query}")
            equal("listing the bucket", status, 200)
            page = [part.split("</Key>")[0] for part in body.decode().split("<Key>")[1:]]
            if not page:
                return found
            found += page
            after = page[-1]


class Server:
    """The server, which is killed and started again."""

    def __init__(self, program, folder, store):
        self.program, self.folder, self.store = program, folder, store
        self.port = free_port()
        self.settings = folder / "conduit.toml"
        self.process = None
        (folder / "secret").write_text("secret\n")

    def start(self, stores_new=True, redirect=True):
        self.settings.write_text(
            f"""
[server]
name = "localhost:{self.port}"
data_dir = "{self.folder}/data"
public_base_url = "http://127.0.0.1:{self.port}"
[[listener]]
address = "127.0.0.1:{self.port}"
[registration]
mode = "open"
[limits]
rate_limits = false
[media.s3]
bucket = "{BUCKET}"
endpoint = "http://127.0.0.1:{self.store.port}"
prefix = "aqueduct/media"
access_key_id = "key"
secret_access_key_file = "{self.folder}/secret"
stores_new = {str(stores_new).lower()}
redirect = {str(redirect).lower()}
"""
        )
        log = open(self.folder / "server.log", "ab")
        command = [self.program, "--config", self.settings, "serve"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        versions = "/_matrix/client/versions"
        until("the server starts", lambda: ask(self.port, "GET", versions)[0] == 200)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(30)

    def command(self, *words):
        """A command of the operator, with its answer as JSON; None where it failed."""
        command = [self.program, "--config", self.settings, "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def on_disk(self):
        """The number of files in the directory of media."""
        return sum(len(files) for _, _, files in os.walk(self.folder / "data" / "media"))


class Person:
    """A user who uploads and downloads."""

    def __init__(self, server, name):
        self.server = server
        body = json.dumps({"username": name, "password": "a password of theirs", "auth": {"type": "m.login.dummy"}})
        status, _, answer = ask(server.port, "POST", "/_matrix/client/v3/register", body)
        equal("registering", status, 200)
        self.token = json.loads(answer)["access_token"]

    def upload(self, bytes, kind="application/octet-stream"):
        path = "/_matrix/media/v3/upload?filename=a%20file"
        status, _, answer = ask(
            self.server.port, "POST", path, bytes, {"Content-Type": kind}, self.token
        )
        equal("uploading", status, 200)
        return json.loads(answer)["content_uri"].removeprefix("mxc://")

    def get(self, item, query="", headers=(), of="download", timeout=180):
        path = f"/_matrix/client/v1/media/{of}/{item}{query}"
        return ask(self.server.port, "GET", path, None, headers, self.token, timeout)

    def has(self, item, bytes):
        status, _, body = self.get(item)
        equal(f"downloading {item}", (status, hashlib.sha256(body).digest()), (200, hashlib.sha256(bytes).digest()))


def picture(width, height):
    """A PNG in one colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x09\x63\xc7" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def files_are_kept(server, store, alice):
    small, large = b"0123456789", os.urandom(40_000_000)
    item = alice.upload(small, "text/plain")
    equal("objects", len(store.names()), 1)
    alice.has(item, small)
    status, fields, body = alice.get(item, headers={"Range": "bytes=3-5"})
    equal("a part", (status, body, fields["content-range"]), (206, b"345", "bytes 3-5/10"))
    alice.has(alice.upload(b""), b"")
    alice.upload(small)
    equal("objects after the same bytes came again", len(store.names()), 2)
    item = alice.upload(large)
    alice.has(item, large)
    _, _, body = alice.get(item, headers={"Range": "bytes=20000000-20000099"})
    equal("a part of a large file", body, large[20_000_000:20_000_100])
    item = alice.upload(picture(640, 480), "image/png")
    status, fields, _ = alice.get(item, "?width=64&height=64&method=crop", of="thumbnail")
    equal("a thumbnail", (status, fields["content-type"]), (200, "image/png"))
    until("parts are thrown away", lambda: server.on_disk() == 0)


def clients_are_sent_there(store, alice):
    item = alice.upload(b"<b>bold</b>", "text/html")
    status, fields, _ = alice.get(item, "?allow_redirect=true")
    equal("a redirect", status, 307)
    url = urllib.parse.urlsplit(fields["location"])
    equal("the store", url.netloc, f"127.0.0.1:{store.port}")
    status, fields, body = ask(store.port, "GET", f"{url.path}?{url.query}")
    equal("the file at the store", (status, body), (200, b"<b>bold</b>"))
    equal("its type", fields["content-type"].split(";")[0], "text/html")
    equal("its disposition", fields["content-disposition"].split(";")[0], "attachment")


def a_store_that_hangs_holds_up_nobody(server, store, alice):
    item = alice.upload(b"while it hangs", "text/plain")
    store.process.send_signal(signal.SIGSTOP)
    found = []
    waiting = [threading.Thread(target=lambda: found.append(alice.get(item))) for _ in range(20)]
    for one in waiting:
        one.start()
    time.sleep(1)
    for _ in range(20):
        began = time.monotonic()
        status, _, _ = ask(server.port, "GET", "/_matrix/client/v3/account/whoami", token=alice.token)
        took = time.monotonic() - began
        equal("who am I", status, 200)
        if took > 2:
            sys.exit(f"a store that hangs held up another request for {took:.1f} seconds")
    store.process.send_signal(signal.SIGCONT)
    for one in waiting:
        one.join()
    equal("downloads once it goes on", {(status, body) for status, _, body in found}, {(200, b"while it hangs")})


def files_move(server, store, alice):
    server.stop()
    server.start(stores_new=False)
    files = [(alice.upload(bytes, "text/plain"), bytes) for bytes in (os.urandom(200_000) for _ in range(150))]
    equal("files on the disk", server.on_disk(), 150)
    # The server is killed while files move, again and again, and each move goes on where the last one was.
    for pause in 0.3, 0.6, 1.0:
        moving = threading.Thread(target=lambda: server.command("media", "move", "--to", "s3"))
        moving.start()
        time.sleep(pause)
        server.stop(signal.SIGKILL)
        moving.join()
        server.start(stores_new=False)
        for item, bytes in files:
            alice.has(item, bytes)
    done = threading.Event()

    wrong = []

    def read_on():
        try:
            while not done.is_set():
                for item, bytes in files:
                    alice.has(item, bytes)
        except BaseException as why:
            wrong.append(why)

    reading = threading.Thread(target=read_on)
    reading.start()
    moved = server.command("media", "move", "--to", "s3")
    if moved is None:
        sys.exit("the files were not moved")
    again = server.command("media", "move", "--to", "s3")
    equal("files that are left to move", again["moved"]["files"], 0)
    back = server.command("media", "move", "--to", "disk")
    done.set()
    reading.join()
    equal("faults of downloads while files moved", wrong, [])
    if back is None or back["moved"]["files"] < 150 or back["moved"]["lost"]:
        sys.exit(f"moving back: {back}")
    for item, bytes in files:
        alice.has(item, bytes)
    checked = server.command("db", "check")
    equal("faults of the store", checked and checked["faults"], 0)


def main():
    program, moto = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        store = Store(moto, folder)
        server = Server(os.path.abspath(program), folder, store)
        try:
            server.start()
            alice = Person(server, "alice")
            files_are_kept(server, store, alice)
            clients_are_sent_there(store, alice)
            a_store_that_hangs_holds_up_nobody(server, store, alice)
            files_move(server, store, alice)
            server.stop()
            log = (folder / "server.log").read_text(errors="replace")
            if "panicked" in log:
                sys.exit("the server panicked:\n" + log[-4000:])
        except SystemExit:
            print((folder / "server.log").read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            for process in filter(None, (server.process, store.process)):
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)
                    process.kill()
    print("files in a bucket: all is as it should be")


main()
