"""People with real clients use files, thumbnails, previews, push rules and pushers of a running server.

    AQUEDUCT_BINARY=path media.py js=COMMAND nio=COMMAND mautrix=COMMAND [browser=CHROMIUM] [--only REGEX]

Each scene plays on a server of its own, and fails on the first thing that is not as it must be. The verbs of the clients are in
nio_person.py, mautrix_files.py and js_media.mjs.
"""

import asyncio
import hashlib
import os
import pathlib
import random
import re
import secrets
import signal
import sys
import tempfile
import time

from PIL import Image

CLIENTS = pathlib.Path(__file__).parent.parent
sys.path.insert(1, str(CLIENTS))

import pushes
import seeking
from driven import Mismatch, Person, equal
from served import Account, Server
from sites import Gateway, Pages

UPLOAD_MAX = 32 << 20
PENDING_MAX = 2
OUTBOUND = "[outbound]\nallow_private_addresses = true\n"
# nio asks for files by the old endpoints alone.
MEDIA = f'[media]\nupload_bytes_max = "32 MiB"\nunauthenticated = true\npending_uploads_max = {PENDING_MAX}\n'
PREVIEWS = "[media.previews]\nenabled = true\n"


class Stage:
    """A server, those who use it, and a directory for files."""

    def __init__(self, binary, commands, directory):
        self.binary, self.commands, self.directory = binary, commands, pathlib.Path(directory)
        self.people, self.servers, self.sites = [], [], []

    async def serve(self, settings=OUTBOUND + MEDIA + PREVIEWS):
        directory = self.directory / f"server{len(self.servers)}"
        directory.mkdir()
        server = Server(self.binary, directory, settings)
        self.servers.append(server)
        await server.start()
        return server

    async def person(self, kind, server):
        person = Person(kind)
        person.process = None
        self.people.append(person)
        await person.start(self.commands[kind], server.url)
        user, password = f"{kind}-{secrets.token_hex(4)}", secrets.token_hex(8)
        await person.do("register", user=user, password=password)
        person.user = (await person.do("login", user=user, password=password))["user"]
        return person

    def site(self, site):
        self.sites.append(site)
        return site

    def file(self, name, content):
        path = self.directory / name
        path.write_bytes(content)
        return str(path)

    def place(self):
        """A place for a file that is downloaded."""
        return str(self.directory / secrets.token_hex(8))

    async def close(self):
        for person in self.people:
            if person.process:
                await person.stop()
        for site in self.sites:
            site.close()
        for server in self.servers:
            if server.process.returncode is None:
                equal("the end of the server", await server.end(signal.SIGTERM), 0)
            if "panicked" in server.log():
                raise Mismatch("the server panicked")

    async def kill(self):
        processes = [it.process for it in self.people + self.servers if getattr(it, "process", None)]
        for process in processes:
            if process.returncode is None:
                # A process is waited for until its pipes are closed.
                if process.stdin:
                    process.stdin.close()
                process.kill()
                await process.wait()


def digest(content):
    return hashlib.sha256(content).hexdigest()


async def content_of(stage, person, uri, **details):
    """What a person gets for a URI: what the client tells of it, and the bytes."""
    to = stage.place()
    told = await person.do("download", uri=uri, to=to, **details)
    return told, pathlib.Path(to).read_bytes()


async def files(stage):
    """Each client gets what each has uploaded, byte for byte."""
    server = await stage.serve()
    people = [await stage.person(kind, server) for kind in ("js", "nio", "mautrix")]
    name = "Ünïted \N{SNOWMAN}.txt"
    for uploader in people:
        content = random.randbytes(300_001)
        path = stage.file("content", content)
        uri = (await uploader.do("upload", path=path, type="text/plain", name=name))["uri"]
        for reader in people:
            told, found = await content_of(stage, reader, uri)
            equal(f"what {reader.label} gets of {uploader.label}", digest(found), digest(content))
            if "type" in told:
                equal("the type", told["type"].split(";")[0], "text/plain")
            if "disposition" in told and "%E2%98%83.txt" not in told["disposition"]:
                raise Mismatch(f"the name of the file is not told: {told}")
    js, nio, mautrix = people
    for person in js, mautrix:
        equal(f"the bound that {person.label} learns", (await person.do("upload_max"))["bytes"], UPLOAD_MAX)
    path = stage.file("large", bytes(UPLOAD_MAX + 1))
    await js.refused("M_TOO_LARGE", "upload", path=path, type="image/png", name="large")
    path = stage.file("largest", random.randbytes(1 << 20) * 32)
    uri = (await mautrix.do("upload", path=path, type="application/octet-stream", name=None))["uri"]
    _, found = await content_of(stage, js, uri)
    equal("the largest file", digest(found), digest(pathlib.Path(path).read_bytes()))
    # A page that would run in a browser comes as something to save.
    path = stage.file("page", b"<script>alert(1)</script>")
    uri = (await js.do("upload", path=path, type="text/html", name="page.html"))["uri"]
    told, _ = await content_of(stage, js, uri)
    if not told["disposition"].startswith("attachment"):
        raise Mismatch(f"a page is shown in the browser: {told}")
    missing = uri[:-6] + "absent"
    await js.refused("M_NOT_FOUND", "download", uri=missing, to=stage.place())


async def later(stage):
    """A URI comes first, and its file later: whoever asks before waits for it."""
    server = await stage.serve()
    mautrix, js = await stage.person("mautrix", server), await stage.person("js", server)
    content = random.randbytes(50_000)
    path = stage.file("later", content)
    uri = (await mautrix.do("reserve"))["uri"]
    await mautrix.refused("504", "download", uri=uri, to=stage.place(), patience_ms=300)
    waiting = asyncio.create_task(content_of(stage, mautrix, uri, patience_ms=15_000))
    await asyncio.sleep(0.5)
    if waiting.done():
        raise Mismatch(f"who asks for a file that is not there yet does not wait: {waiting.exception()}")
    await mautrix.do("fill", uri=uri, path=path, type="image/png", name="late.png")
    _, found = await waiting
    equal("a file that came later", digest(found), digest(content))
    other = stage.file("other", b"another file")
    await mautrix.refused("M_CANNOT_OVERWRITE_MEDIA", "fill", uri=uri, path=other, type="image/png", name="again.png")
    _, found = await content_of(stage, js, uri)
    equal("a file that is not overwritten", digest(found), digest(content))
    uri = (await mautrix.do("upload_later", path=path, type="image/png", name="beside.png"))["uri"]
    _, found = await content_of(stage, mautrix, uri, patience_ms=15_000)
    equal("a file that was uploaded beside", digest(found), digest(content))
    for _ in range(PENDING_MAX):
        await mautrix.do("reserve")
    await mautrix.refused("M_LIMIT_EXCEEDED", "reserve")


def picture(size, left=(255, 0, 0), right=(0, 0, 255)):
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return image


async def thumbnail_of(stage, person, uri, width, height, method):
    to = stage.place()
    await person.do("thumbnail", uri=uri, width=width, height=height, method=method, to=to)
    with Image.open(to) as image:
        return image.convert("RGB")


def require_halves(what, image, left="red", right="blue"):
    """The left half of a picture shows one color, and the right half the other."""
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for part, color in (1, left), (3, right):
        pixel = image.getpixel((image.width * part // 4, image.height // 2))
        if max(abs(a - b) for a, b in zip(pixel, colors[color])) > 40:
            raise Mismatch(f"{what}: quarter {part} is {pixel}, not {color}")


async def pictures(stage):
    """Thumbnails are as large as asked, and show what the picture shows."""
    server = await stage.serve()
    js, nio = await stage.person("js", server), await stage.person("nio", server)
    mautrix = await stage.person("mautrix", server)
    path = stage.place()
    picture((1200, 800)).save(path, "PNG")
    uri = (await js.do("upload", path=path, type="image/png", name="halves.png"))["uri"]
    for person in js, nio, mautrix:
        image = await thumbnail_of(stage, person, uri, 96, 96, "crop")
        equal(f"the size of what {person.label} has cropped", image.size, (96, 96))
        require_halves(f"what {person.label} has cropped", image)
        image = await thumbnail_of(stage, person, uri, 640, 480, "scale")
        is_large = image.width == 640 or image.height == 480
        if not is_large or abs(image.width / image.height - 1.5) > 0.02:
            raise Mismatch(f"{person.label} has a picture of 1200x800 scaled to 640x480 and gets {image.size}")
        require_halves(f"what {person.label} has scaled", image)
    # A photograph that was taken with the camera on its side is upright.
    path = stage.place()
    exif = Image.Exif()
    exif[0x0112] = 3
    picture((1200, 800)).save(path, "JPEG", exif=exif)
    uri = (await nio.do("upload", path=path, type="image/jpeg", name="turned.jpg"))["uri"]
    require_halves("a photograph that was turned", await thumbnail_of(stage, js, uri, 320, 240, "scale"), "blue", "red")
    path = stage.place()
    picture((40, 30)).save(path, "WEBP", lossless=True)
    uri = (await mautrix.do("upload", path=path, type="image/webp", name="small.webp"))["uri"]
    equal("a small picture", (await thumbnail_of(stage, nio, uri, 320, 240, "scale")).size, (40, 30))
    # What is no picture has no thumbnail.
    path = stage.file("text", b"no picture")
    uri = (await nio.do("upload", path=path, type="image/png", name="none.png"))["uri"]
    await js.refused("M_UNKNOWN", "thumbnail", uri=uri, width=32, height=32, method="crop", to=stage.place())


async def avatars(stage):
    """An avatar that one sets is seen by others, also in the rooms that they share."""
    server = await stage.serve()
    js, nio = await stage.person("js", server), await stage.person("nio", server)
    path = stage.place()
    picture((256, 256)).save(path, "PNG")
    room = (await js.do("create_room", name="The gallery", invite=[nio.user]))["room"]
    await nio.sees("mine", room=room, membership="invite", sender=js.user)
    await nio.do("join", room=room)
    await js.sees("member", room=room, user=nio.user, membership="join")
    for one, other in (nio, js), (js, nio):
        uri = (await one.do("upload", path=path, type="image/png", name="me.png"))["uri"]
        await one.do("set_avatar", uri=uri)
        equal(f"the avatar of {one.label}", (await other.do("avatar", user=one.user))["uri"], uri)
        await until(
            f"{other.label} sees the avatar in the room", lambda: other.do("avatar_in", room=room, user=one.user),
            lambda seen: seen["uri"] == uri)
        image = await thumbnail_of(stage, other, uri, 32, 32, "crop")
        equal("the size of the avatar", image.size, (32, 32))
        require_halves("the avatar", image)


async def until(what, ask, holds, seconds_max=15):
    """Asks until the answer is as it must be."""
    end = time.monotonic() + seconds_max
    while not holds(answer := await ask()):
        if time.monotonic() > end:
            raise Mismatch(f"within {seconds_max} s it was not so that {what}: {answer}")
        await asyncio.sleep(0.1)
    return answer


PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>Not this</title>
<meta property="og:title" content="Cisterns &amp; wells"><meta property="og:description" content="Where water waits.">
<meta property="og:image" content="/picture.png"><meta property="og:site_name" content="The waterworks"></head>
<body><p>More of it.</p></body></html>"""
TEXT = "Пруд роют там, где вода не уходит, и копают его глубже, чем кажется нужным."
PLAIN = f"<!DOCTYPE html><title>Пруды</title><body><script>no()</script><p>{TEXT}</p></body>"


async def previews(stage):
    """Clients see what a link is about, and each page is asked for once. Nothing is asked of private addresses unless that is allowed."""
    server = await stage.serve()
    js, mautrix = await stage.person("js", server), await stage.person("mautrix", server)
    pages = stage.site(Pages())
    path = stage.place()
    picture((400, 200)).save(path, "PNG")
    shown = pathlib.Path(path).read_bytes()
    pages.pages = {
        "/page": ("text/html", PAGE.encode()),
        "/picture.png": ("image/png", shown),
        "/moved": ("redirect", "/page"),
        "/plain": ("text/html; charset=windows-1251", PLAIN.encode("windows-1251")),
    }
    for person, path in (js, "/page"), (mautrix, "/page"), (js, "/moved"):
        seen = await person.do("preview", url=pages.url + path)
        equal(f"the title of {path}", seen["og:title"], "Cisterns & wells")
        if person is js:
            equal(f"the description of {path}", seen["og:description"], "Where water waits.")
            equal(f"the size of the picture of {path}", seen["matrix:image:size"], len(shown))
        told, found = await content_of(stage, js, seen["og:image"])
        equal(f"the picture of {path}", (told["type"], digest(found)), ("image/png", digest(shown)))
    if pages.asked["/page"] > 2:
        raise Mismatch(f"a page was asked for again and again: {pages.asked}")
    seen = await js.do("preview", url=pages.url + "/plain")
    equal("a page without OpenGraph", (seen["og:title"], seen["og:description"]), ("Пруды", TEXT))
    await js.refused("M_", "preview", url=pages.url + "/absent")
    for settings, code in (PREVIEWS, "M_"), (OUTBOUND, "M_"):
        closed = await stage.serve(settings)
        person = await stage.person("js", closed)
        pages.asked.clear()
        await person.refused(code, "preview", url=pages.url + "/page")
        equal(f"what was asked for with {settings!r}", pages.asked, {})


async def curl(*arguments):
    process = await asyncio.create_subprocess_exec("curl", "-sS", *arguments, stdout=asyncio.subprocess.PIPE)
    told, _ = await asyncio.wait_for(process.communicate(), 30)
    if process.returncode != 0:
        raise Mismatch(f"curl {arguments} ended with {process.returncode}")
    return told.decode()


async def ranges(stage):
    """curl gets parts of a file, goes on with a download that broke off, and gets nothing that it has."""
    server = await stage.serve()
    nio = await stage.person("nio", server)
    account = await Account.register(server, "curl")
    content = random.randbytes(3_000_000)
    path = stage.file("content", content)
    uri = (await nio.do("upload", path=path, type="video/mp4", name="film.mp4"))["uri"]
    url = f"{server.url}/_matrix/client/v1/media/download/{uri.removeprefix('mxc://')}"
    to, etag = stage.place(), stage.place()
    get = ["-H", f"Authorization: Bearer {account.token}", "-o", to, "-w", "%{http_code} %header{content-range}", url]
    size = len(content)
    for asked, low, high in ("100-199", 100, 199), ("2999990-", 2_999_990, size - 1), ("-500", size - 500, size - 1), ("0-0", 0, 0), (
            "2999999-9999999", size - 1, size - 1):
        told = await curl("-r", asked, *get)
        equal(f"the answer to {asked}", told, f"206 bytes {low}-{high}/{size}")
        equal(f"the bytes {asked}", pathlib.Path(to).read_bytes() == content[low:high + 1], True)
    equal("a range beyond the end", await curl("-r", "3000000-", *get), f"416 bytes */{size}")
    pathlib.Path(to).write_bytes(content[:1_234_567])
    equal("what is left of a download", await curl("-C", "-", *get), f"206 bytes 1234567-{size - 1}/{size}")
    equal("a download that went on", digest(pathlib.Path(to).read_bytes()), digest(content))
    equal("a whole file", (await curl("--etag-save", etag, *get)).strip(), "200")
    equal("a file that is there already", (await curl("--etag-compare", etag, *get)).strip(), "304")
    equal("who has no token", (await curl("-o", to, "-w", "%{http_code}", url)), "401")


async def pushed(stage):
    await pushes.play(stage, await stage.serve(), stage.site(Gateway()), until)


async def browser(stage):
    await seeking.play(stage, await stage.serve(), stage.commands["browser"])


SCENES = [files, later, pictures, avatars, previews, ranges, pushed, browser]


async def main(arguments):
    only = ""
    if "--only" in arguments:
        at = arguments.index("--only")
        only = arguments[at + 1]
        del arguments[at:at + 2]
    commands = dict(argument.split("=", 1) for argument in arguments)
    scenes = [scene for scene in SCENES if re.search(only, scene.__name__)]
    if "browser" not in commands:
        scenes = [scene for scene in scenes if scene is not browser]
    if not scenes:
        sys.exit(f"there is no scene {only}")
    failed = 0
    for scene in scenes:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            stage = Stage(os.environ["AQUEDUCT_BINARY"], commands, directory)
            try:
                await scene(stage)
                await stage.close()
                print(f"{scene.__name__}: well, in {time.monotonic() - began:.1f} s", flush=True)
            except Mismatch as mismatch:
                failed += 1
                for server in stage.servers:
                    print("\n".join(server.log().splitlines()[-30:]), file=sys.stderr)
                print(f"{scene.__name__}: {mismatch}", file=sys.stderr, flush=True)
            finally:
                await stage.kill()
    print(f"{len(scenes) - failed} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(asyncio.run(main(sys.argv[1:])))
