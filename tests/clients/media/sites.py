"""The other ends of a run, on loopback: pages of which previews are made, and a push gateway that notes what it is told."""

import asyncio
import http.server
import json
import threading

from driven import Mismatch

SECONDS_MAX = 20


class Site:
    """An HTTP server in a thread of its own; `answer` says what it answers."""

    def __init__(self):
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, content = site.answer(self, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_OPTIONS = serve

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://localhost:{self.server.server_port}"

    def answer(self, request, body):
        raise NotImplementedError

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Pages(Site):
    """Pages by their path: the type and the bytes of each. Counts how often each was asked for."""

    def __init__(self):
        super().__init__()
        self.pages, self.asked = {}, {}

    def answer(self, request, body):
        path = request.path.split("?")[0]
        self.asked[path] = self.asked.get(path, 0) + 1
        if path not in self.pages:
            return 404, {}, b""
        kind, content = self.pages[path]
        if kind == "redirect":
            return 302, {"Location": content}, b""
        return 200, {"Content-Type": kind}, content


class Gateway(Site):
    """A push gateway: notes each notification that it takes, and takes none while it is `down`."""

    def __init__(self):
        super().__init__()
        self.taken, self.refused, self.rejected = [], [], []
        self.is_down = False

    def answer(self, request, body):
        if request.command != "POST" or request.path != "/_matrix/push/v1/notify":
            return 404, {}, b"{}"
        notification = json.loads(body)["notification"]
        if self.is_down:
            self.refused.append(notification)
            return 503, {}, b"{}"
        self.taken.append(notification)
        answer = json.dumps({"rejected": self.rejected}).encode()
        return 200, {"Content-Type": "application/json"}, answer

    def of(self, key):
        """The notifications of one device, in their order."""
        return [it for it in list(self.taken) if it["devices"][0]["pushkey"] == key]

    async def takes(self, key, what, holds, seconds_max=SECONDS_MAX):
        """Waits for a notification of a device, which is then forgotten with all before it."""
        for _ in range(seconds_max * 20):
            for notification in self.of(key):
                self.taken.remove(notification)
                if holds(notification):
                    return notification
                if "event_id" in notification:
                    raise Mismatch(f"the gateway was told of something else before {what}: {json.dumps(notification, indent=1)}")
            await asyncio.sleep(0.05)
        raise Mismatch(f"the gateway was not told within {seconds_max} s of {what}; it refused {self.refused}")

    async def refuses(self, what, holds):
        """Waits for a notification that the gateway does not take."""
        for _ in range(SECONDS_MAX * 20):
            if any(holds(notification) for notification in list(self.refused)):
                return
            await asyncio.sleep(0.05)
        raise Mismatch(f"the gateway was not asked within {SECONDS_MAX} s to take {what}")
