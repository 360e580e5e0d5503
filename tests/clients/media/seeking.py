"""A browser seeks in a video that asks for an access token: a page of another origin has its service worker add the token, as Element Web does,
and the browser asks for the parts that it needs."""

import asyncio
import json
import os
import signal
import subprocess
import urllib.parse

import imageio_ffmpeg

from driven import Mismatch
from served import Account
from sites import Site

# The video shows red for so long, and then blue for as long.
HALF_SECONDS = 20
# Large enough that a browser does not take it whole before it seeks.
BYTES_MIN = 8 << 20
SECONDS_MAX = 60

WORKER = """
const token = new URL(location).searchParams.get("token");
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(clients.claim()));
self.addEventListener("fetch", (event) => {
  if (new URL(event.request.url).pathname.startsWith("/_matrix/client/v1/media/")) event.respondWith(ask(event.request));
});
async function ask(request) {
  const headers = { Authorization: `Bearer ${token}` };
  const range = request.headers.get("Range");
  if (range) headers.Range = range;
  const answer = await fetch(request.url, { headers, mode: "cors", credentials: "omit" });
  const note = { range, status: answer.status };
  await fetch("/asked", { method: "POST", body: JSON.stringify(note) });
  return answer;
}
"""

PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>seeking</title><video crossorigin="anonymous" muted></video><script type="module">
const { file, token } = Object.fromEntries(new URL(location).searchParams);
const report = (text) => fetch("/report", { method: "POST", body: text });
const require = (holds, what) => { if (!holds) throw new Error(what); };
try {
  await navigator.serviceWorker.register("/worker.js?token=" + token);
  await navigator.serviceWorker.ready;
  if (!navigator.serviceWorker.controller)
    await new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve));
  const video = document.querySelector("video");
  const happens = (name) => new Promise((resolve, reject) => {
    video.addEventListener(name, resolve, { once: true });
    video.addEventListener("error", () => reject(new Error(`${name}: ${video.error.message}`)), { once: true });
  });
  const loaded = happens("loadeddata");
  video.preload = "auto";
  video.src = file;
  await loaded;
  require(Math.abs(video.duration - SECONDS) < 1, "the video takes " + video.duration);
  require(video.seekable.length === 1 && video.seekable.end(0) > SECONDS - 1, "one cannot seek everywhere");
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const color = async (second) => {
    const sought = happens("seeked");
    video.currentTime = second;
    await sought;
    canvas.drawImage(video, 0, 0, 1, 1);
    const [red, , blue] = canvas.getImageData(0, 0, 1, 1).data;
    return red > blue ? "red" : "blue";
  };
  const seen = [];
  for (const second of [SECONDS - 2, 2, SECONDS / 2 + 5, SECONDS / 2 - 5]) seen.push(await color(second));
  require(seen.join() === "blue,red,blue,red", "the browser shows " + seen);
  report("well: " + navigator.userAgent);
} catch (error) {
  report("failed: " + error);
}
</script>""".replace("SECONDS", str(2 * HALF_SECONDS))


class Cinema(Site):
    """The page, its worker, and what both tell."""

    def __init__(self):
        super().__init__()
        self.asked, self.reported = [], []

    def answer(self, request, body):
        match request.path.split("?")[0]:
            case "/":
                return 200, {"Content-Type": "text/html"}, PAGE.encode()
            case "/worker.js":
                return 200, {"Content-Type": "text/javascript"}, WORKER.encode()
            case "/asked":
                self.asked.append(json.loads(body))
            case "/report":
                self.reported.append(body.decode())
        return 200, {}, b""


def film(path):
    """Makes the video: noise does not get smaller, so that it is large though it is small and short."""
    parts = [f"color={color}:s=320x240:r=4:d={HALF_SECONDS}" for color in ("red", "blue")]
    inputs = [argument for part in parts for argument in ("-f", "lavfi", "-i", part)]
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *inputs, "-filter_complex", "[0][1]concat=n=2:v=1,noise=alls=60:allf=t+u",
         "-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "4M", "-minrate", "4M", "-maxrate", "4M", "-g", "4", path],
        check=True)


async def play(stage, server, chromium):
    path = stage.place() + ".webm"
    await asyncio.to_thread(film, path)
    size = (await asyncio.to_thread(lambda: open(path, "rb").seek(0, 2)))
    if size < BYTES_MIN:
        raise Mismatch(f"the video has only {size} bytes")
    js = await stage.person("js", server)
    viewer = await Account.register(server, "viewer")
    uri = (await js.do("upload", path=path, type="video/webm", name="film.webm"))["uri"]
    cinema = stage.site(Cinema())
    file = f"{server.url}/_matrix/client/v1/media/download/{uri.removeprefix('mxc://')}"
    page = f"{cinema.url}/?{urllib.parse.urlencode({'file': file, 'token': viewer.token})}"
    await watch(stage, chromium, page, cinema)
    told = cinema.reported[0]
    if not told.startswith("well: "):
        raise Mismatch(f"{told}; it asked for {cinema.asked}")
    starts = [int(it["range"].removeprefix("bytes=").split("-")[0]) for it in cinema.asked if it["range"] and it["status"] == 206]
    if not any(start > size // 2 for start in starts) or {it["status"] for it in cinema.asked} != {206}:
        raise Mismatch(f"the browser did not get the parts that it sought, of {size} bytes: {cinema.asked}")


async def watch(stage, chromium, page, cinema):
    """Has the browser show the page until that has told what it saw."""
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={stage.place()}", "--remote-debugging-port=0", page]
    window = await asyncio.create_subprocess_exec(
        chromium, *arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(SECONDS_MAX * 10):
            if cinema.reported:
                return
            await asyncio.sleep(0.1)
        raise Mismatch(f"the page said nothing within {SECONDS_MAX} s; it asked for {cinema.asked}")
    finally:
        # Debian's browser is started by a script, which would leave it behind.
        os.killpg(window.pid, signal.SIGKILL)
        await window.wait()
