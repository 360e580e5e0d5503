"""A client's end of the pipe that drives it; obey.mjs is the same for JavaScript.

Commands come in as lines of JSON, {"id": 1, "do": "send", ..}; each is answered with {"id": 1, "result": ..} or
{"id": 1, "error": ..}. What the person sees through sync goes out as {"saw": {"kind": "message", ..}}: the kinds and their
fields are those of js_person.mjs.
"""

import asyncio
import hashlib
import json
import logging
import sys

# Warnings are a library's own chatter; a client that runs into an error says so.
logging.basicConfig(level=logging.ERROR)


def tell(line):
    print(json.dumps(line), flush=True)


def saw(**what):
    tell({"saw": what})


def saw_to_device(events):
    """Names each encrypted message to this device by a hash, so that one that comes twice is recognised."""
    for event in events:
        if event["type"] == "m.room.encrypted":
            ciphertext = json.dumps(event["content"]["ciphertext"], sort_keys=True)
            saw(kind="to_device", sender=event["sender"], hash=hashlib.sha256(ciphertext.encode()).hexdigest())


class Pause:
    """A place after the claim of keys where the client can be held, and where it tells which keys it was given."""

    def __init__(self):
        self.open = asyncio.Event()
        self.open.set()

    async def here(self, keys_by_user):
        keys = [[user, device, str(key)] for user, devices in keys_by_user.items() for device, found in devices.items()
                for key in found]
        saw(kind="claimed", keys=keys)
        await self.open.wait()


async def obey(person):
    """Carries out commands until there are no more; each beside the others, as a client does what it is asked."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running = set()
    while line := await lines.readline():
        task = asyncio.create_task(carry_out(person, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


async def carry_out(person, command):
    number, verb = command.pop("id"), command.pop("do")
    try:
        tell({"id": number, "result": await getattr(person, verb)(**command)})
    except Exception as problem:
        code = getattr(problem, "errcode", None)
        tell({"id": number, "error": f"{code or ''} {str(problem) or repr(problem)}".strip()})
