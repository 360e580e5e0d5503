#!/usr/bin/env python3
"""A browser opens a socket (docs/socket.md): a page of another origin brings its access token as a protocol, follows the news,
sends an event and sees it, and is told by a code that its session has ended.

    AQUEDUCT_BINARY=target/debug/aqueduct tests/clients/browser_socket.py

needs a Chromium without a window: chromium-headless-shell of Debian, or what CHROMIUM names.
"""

import http.server
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>socket</title><script type="module">
const server = new URL(location).searchParams.get("server");
const report = (text) => fetch("/report", { method: "POST", body: text });
const api = async (method, path, token, body) => {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(server + "/_matrix/client/v3" + path, { method, headers, body: JSON.stringify(body) });
  return await answer.json();
};
const require = (holds, what) => { if (!holds) throw new Error(what); };
try {
  const login = { username: "browser", password: "password", auth: { type: "m.login.dummy" } };
  const { access_token: token } = await api("POST", "/register", null, login);
  const { room_id } = await api("POST", "/createRoom", token, {});
  const url = server.replace("http", "ws") + "/_aqueduct/client/v1/socket";
  const open = (protocols) => new Promise((resolve) => {
    const socket = new WebSocket(url, protocols);
    socket.onopen = () => resolve(socket);
    socket.onclose = () => resolve(null);
  });
  require(await open(["aqueduct.v1", "bearer.wrong"]) === null, "a wrong token opens a socket");
  const socket = await open(["aqueduct.v1", "bearer." + token]);
  require(socket, "the socket is not opened");
  require(socket.protocol === "aqueduct.v1", "another protocol was selected: " + socket.protocol);
  require(socket.extensions === "", "there are extensions: " + socket.extensions);
  const heard = [];
  let wake = () => {};
  socket.onmessage = ({ data }) => { heard.push(JSON.parse(data)); wake(); };
  const until = async (is) => {
    for (;;) {
      const at = heard.findIndex(is);
      if (at >= 0) return heard.splice(at, 1)[0];
      await new Promise((resolve) => { wake = resolve; });
    }
  };
  const say = (message) => socket.send(JSON.stringify(message));
  say({ id: 1, method: "sync", params: {} });
  await until((it) => it.id === 1 && it.result);
  const first = await until((it) => it.method === "sync");
  require(first.params.rooms.join[room_id], "the room is not told");
  say({ method: "ack", params: { pos: first.params.next_batch } });
  const content = { msgtype: "m.text", body: "hello \\u{1f310} ".repeat(2000) };
  say({ id: "two", method: "send", params: { room_id, type: "m.room.message", txn_id: "t", content } });
  const sent = await until((it) => it.id === "two");
  require(sent.result, JSON.stringify(sent));
  const second = await until((it) => it.method === "sync");
  const event = second.params.rooms.join[room_id].timeline.events[0];
  require(event.event_id === sent.result.event_id, "another event is told");
  require(event.content.body === content.body, "the event has another content");
  require(event.unsigned.transaction_id === "t", "the event does not say which request it is of");
  const closed = new Promise((resolve) => { socket.onclose = resolve; });
  await api("POST", "/logout", token, {});
  const { code, reason } = await closed;
  require(code === 4001, "the socket ended with " + code);
  report(`well: ${navigator.userAgent}; ended with ${code}, ${reason}`);
} catch (error) {
  report("failed: " + error);
}
</script>"""


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def serve(directory):
    """Starts the server, and answers its process and its address."""
    port = free_port()
    config = pathlib.Path(directory) / "conduit.toml"
    config.write_text(
        f'[server]\nname = "localhost:{port}"\ndata_dir = "{directory}/data"\n'
        f'[[listener]]\naddress = "127.0.0.1:{port}"\n[registration]\nmode = "open"\n'
    )
    binary = os.environ.get("AQUEDUCT_BINARY", "target/debug/aqueduct")
    server = subprocess.Popen([binary, "--config", str(config)], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(url + "/_matrix/client/versions").read()
            return server, url
        except OSError:
            time.sleep(0.1)
    server.kill()
    sys.exit("the server did not start")


def main():
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if not browser:
        sys.exit("there is no Chromium; name one in CHROMIUM")
    reported, told = threading.Event(), []

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def do_POST(self):
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()
            reported.set()

        def log_message(self, *_):
            pass

    pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as directory:
        server, url = serve(directory)
        page = f"http://localhost:{pages.server_port}/?server={url}"
        args = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/profile"]
        window = subprocess.Popen(
            [browser, *args, "--remote-debugging-port=0", page],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            reported.wait(60)
        finally:
            # Debian's browser is started by a script, which would leave it behind.
            os.killpg(window.pid, signal.SIGKILL)
            server.terminate()
            for process in (window, server):
                process.wait()
    said = told[0] if told else "failed: the page said nothing within a minute"
    print(said)
    sys.exit(0 if said.startswith("well: ") else 1)


if __name__ == "__main__":
    main()
