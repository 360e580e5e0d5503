"""Two homeservers on loopback that reach each other through gates, which a scenario can cut and mend.

A server's name is the address of its gate. The gate passes bytes on to the server's own TLS listener; clients use a plain
listener beside it, so that they still reach a server that is cut off from the others. Each server has an address of loopback
for itself, because access lists know no ports.
"""

import asyncio
import base64
import datetime
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from people import PATIENCE

START_SECONDS_MAX = 90 * PATIENCE
STOP_SECONDS_MAX = 20 * PATIENCE


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Authority:
    """A certificate authority that only the servers of this run trust."""

    def __init__(self, dir):
        self.dir = dir
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
        self.file = dir / "authority.pem"
        certificate = self._certificate(self.name, self.key.public_key(), x509.BasicConstraints(True, 0))
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _certificate(self, subject, public_key, *extensions):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(public_key)
                   .serial_number(x509.random_serial_number())
                   .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=2)))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def certify(self, address, label):
        """Makes a certificate for an IP address; returns the files of it and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)]), key.public_key(),
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]),
            x509.BasicConstraints(False, None), x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]))
        files = self.dir / f"{label}.pem", self.dir / f"{label}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return files


class Gate:
    """Passes connections from a port on to another, until it is cut."""

    loop = None

    def __init__(self, address, target):
        self.address, self.target = address, target
        self.is_cut = False
        self.open = set()
        if Gate.loop is None:
            Gate.loop = asyncio.new_event_loop()
            threading.Thread(target=Gate.loop.run_forever, daemon=True).start()
        self.port = self._run(self._listen())

    @staticmethod
    def _run(work):
        return asyncio.run_coroutine_threadsafe(work, Gate.loop).result(10)

    async def _listen(self):
        self.listener = await asyncio.start_server(self._accept, self.address, 0)
        return self.listener.sockets[0].getsockname()[1]

    async def _accept(self, reader, writer):
        ends = [writer]
        if not self.is_cut:
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
                ends.append(far_writer)
                self.open.update(ends)
                await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            except OSError:
                pass
        for end in ends:
            self.open.discard(end)
            end.close()

    async def _pass(self, reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _cut(self):
        self.is_cut = True
        for writer in list(self.open):
            writer.transport.abort()

    def cut(self):
        """Ends all connections, and each new one at once."""
        self._run(self._cut())

    def mend(self):
        self.is_cut = False


class Server:
    """What all servers have in common: a directory, a gate, a process and its log."""

    kind = "server"

    def __init__(self, label, address, dir, authority):
        self.label, self.address = label, address
        self.dir = dir / label
        self.dir.mkdir()
        self.authority = authority
        self.client_port, self.tls_port = free_port(), free_port()
        self.gate = Gate(address, self.tls_port)
        self.name = f"{address}:{self.gate.port}"
        self.url = f"http://127.0.0.1:{self.client_port}"
        self.certificate, self.key = authority.certify(address, label)
        self.log = self.dir / "log"
        self.process = None
        self.configure()

    def __str__(self):
        return self.label

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.dir, start_new_session=True)
        end = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/_matrix/client/versions", timeout=5) as answer:
                    answer.read()
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        raise RuntimeError(f"{self.label} did not start:\n{self.tail(40)}")

    def stop(self):
        """Ends the process by a signal; it must end by itself, and with success."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            status = self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"{self.label} did not end within {STOP_SECONDS_MAX} s of SIGTERM") from None
        if status not in self.good_ends:
            raise RuntimeError(f"{self.label} ended with {status}")

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def freeze(self):
        """The process stands still: connections are accepted by the kernel and nobody answers."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def is_up(self):
        return self.process is not None and self.process.poll() is None

    def recover(self):
        """Whatever a scenario left behind: it runs, and others reach it."""
        self.gate.mend()
        if self.is_up():
            self.thaw()
        else:
            self.start()

    def tail(self, lines, since=0):
        with open(self.log, "rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace").splitlines()
        return "\n".join(text[-lines:])

    def panics(self):
        with open(self.log, errors="replace") as log:
            return [line.rstrip() for line in log if "panicked" in line]


class Synapse(Server):
    kind = "synapse"
    good_ends = (0, -signal.SIGTERM)

    def configure(self):
        self.signing_key = self.dir / "signing.key"
        self.old_keys = {}
        self._new_key()
        lots = {"per_second": 10_000, "burst_count": 10_000}
        self.config = {
            "server_name": self.name,
            "public_baseurl": f"{self.url}/",
            "report_stats": False,
            "pid_file": str(self.dir / "pid"),
            "log_config": str(self.dir / "log.json"),
            "signing_key_path": str(self.signing_key),
            "trusted_key_servers": [],
            "database": {"name": "sqlite3", "args": {"database": str(self.dir / "homeserver.db")}},
            "media_store_path": str(self.dir / "media"),
            "listeners": [
                {"port": self.client_port, "bind_addresses": ["127.0.0.1"], "type": "http", "tls": False,
                 "resources": [{"names": ["client"]}]},
                {"port": self.tls_port, "bind_addresses": ["127.0.0.1"], "type": "http", "tls": True,
                 "resources": [{"names": ["federation"]}]},
            ],
            "tls_certificate_path": str(self.certificate),
            "tls_private_key_path": str(self.key),
            "federation_custom_ca_list": [str(self.authority.file)],
            "federation_ip_range_blacklist": [],
            "ip_range_blacklist": [],
            "federation": {
                "client_timeout": f"{int(10 * PATIENCE)}s", "max_short_retries": 1, "max_short_retry_delay": "1s",
                "max_long_retries": 1, "max_long_retry_delay": "1s",
                "destination_min_retry_interval": "1s", "destination_retry_multiplier": 1,
                "destination_max_retry_interval": "3s",
            },
            "macaroon_secret_key": secrets.token_hex(16),
            "form_secret": secrets.token_hex(16),
            "enable_registration": True,
            "enable_registration_without_verification": True,
            "bcrypt_rounds": 4,
            "presence": {"enabled": True},
            "allow_public_rooms_over_federation": True,
            "allow_public_rooms_without_auth": True,
            "room_list_publication_rules": [{"action": "allow"}],
            "rc_message": lots, "rc_registration": lots, "rc_joins_per_room": lots, "rc_admin_redaction": lots,
            "rc_login": {"address": lots, "account": lots, "failed_attempts": lots},
            "rc_joins": {"local": lots, "remote": lots},
            "rc_invites": {"per_room": lots, "per_user": lots, "per_issuer": lots},
            "rc_presence": {"per_user": lots}, "rc_room_creation": lots, "rc_key_requests": lots,
            "rc_federation": {"window_size": 1000, "sleep_limit": 10_000, "sleep_delay": 1, "reject_limit": 10_000,
                              "concurrent": 100},
            "federation_rr_transactions_per_room_per_second": 1000,
        }
        self._write()
        level = os.environ.get("SYNAPSE_LOG", "INFO")
        (self.dir / "log.json").write_text(json.dumps({
            "version": 1, "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
            "handlers": {"out": {"class": "logging.FileHandler", "filename": str(self.log), "formatter": "line"}},
            "loggers": {"synapse.storage.SQL": {"level": "INFO"}},
            "root": {"level": level, "handlers": ["out"]},
        }))

    def _new_key(self):
        seed = base64.b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        self.signing_key.write_text(f"ed25519 a_{secrets.token_hex(2)} {seed}\n")

    def _write(self):
        (self.dir / "homeserver.json").write_text(json.dumps(self.config, indent=1))

    def command(self):
        return [sys.executable, "-m", "synapse.app.homeserver", "-c", str(self.dir / "homeserver.json")]

    def rotate_key(self):
        """Starts anew with another signing key; the one until now is published as an old one."""
        from signedjson.key import decode_signing_key_base64, encode_verify_key_base64

        algorithm, version, seed = self.signing_key.read_text().split()
        public = encode_verify_key_base64(decode_signing_key_base64(algorithm, version, seed).verify_key)
        self.stop()
        self.config.setdefault("old_signing_keys", {})[f"{algorithm}:{version}"] = {
            "key": public, "expired_ts": int(time.time() * 1000)}
        self._new_key()
        self._write()
        self.start()


class Aqueduct(Server):
    kind = "aqueduct"
    good_ends = (0,)

    def configure(self):
        self.binary = os.environ.get("AQUEDUCT_BINARY") or sys.exit("AQUEDUCT_BINARY names no binary")
        self.settings = self.dir / "conduit.toml"
        self.settings.write_text(f"""
[server]
name = "{self.name}"
data_dir = "{self.dir}/data"
public_base_url = "{self.url}"
[[listener]]
address = "127.0.0.1:{self.client_port}"
[[listener]]
address = "127.0.0.1:{self.tls_port}"
tls = {{ certificate = "{self.certificate}", key = "{self.key}" }}
[registration]
mode = "open"
[passwords]
argon2_memory_kib = 64
[storage]
durability = "os"
[federation]
trusted_ca_file = "{self.authority.file}"
networks_allowed = ["127.0.0.0/8"]
public_rooms = true
[limits]
rate_limits = false
[log]
level = "{os.environ.get("AQUEDUCT_LOG", "info")}"
""")

    def command(self):
        return [self.binary, "--config", str(self.settings), "serve"]

    def rotate_key(self):
        """Starts anew with another signing key; the one until now is published as an old one."""
        subprocess.run([self.binary, "--config", str(self.settings), "federation", "rotate-key"],
                       check=True, timeout=60, cwd=self.dir, stdout=subprocess.DEVNULL)
        self.stop()
        self.start()


KINDS = {"synapse": Synapse, "aqueduct": Aqueduct}
