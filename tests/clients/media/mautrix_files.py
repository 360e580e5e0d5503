"""A person who uses mautrix without encryption, driven as obey.py says. It knows as much as media.py asks of it."""

import asyncio
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from mautrix.api import HTTPAPI, Method, Path
from mautrix.client import Client
from mautrix.errors import MatrixResponseError
from mautrix.types import UserID

from obey import obey


class Person:
    def __init__(self, server):
        self.client = Client(api=HTTPAPI(server, default_retry_count=0))

    async def register(self, user, password):
        body = {"username": user, "password": password, "auth": {"type": "m.login.dummy"}}
        return {"user": (await self.client.api.request(Method.POST, Path.v3.register, body))["user_id"]}

    async def login(self, user, password):
        answer = await self.client.login(identifier=user, password=password, device_name="mautrix")
        return {"user": answer.user_id, "device": answer.device_id}

    async def logout(self):
        await self.client.logout()

    async def upload(self, path, type, name):
        return {"uri": await self.client.upload_media(pathlib.Path(path).read_bytes(), type, name)}

    async def reserve(self):
        """A URI to which something will be uploaded."""
        return {"uri": (await self.client.create_mxc()).content_uri}

    async def fill(self, uri, path, type, name):
        try:
            await self.client.upload_media(pathlib.Path(path).read_bytes(), type, name, mxc=uri)
        except MatrixResponseError:
            # The library looks for a URI in an answer that is empty by the specification.
            pass

    async def upload_later(self, path, type, name):
        """Names the URI at once, and uploads beside everything else."""
        return {"uri": await self.client.upload_media(pathlib.Path(path).read_bytes(), type, name, async_upload=True)}

    async def download(self, uri, to, patience_ms=None):
        pathlib.Path(to).write_bytes(await self.client.download_media(uri, timeout_ms=patience_ms))
        return {}

    async def thumbnail(self, uri, width, height, method, to):
        pathlib.Path(to).write_bytes(await self.client.download_thumbnail(uri, width, height, method))
        return {}

    async def upload_max(self):
        return {"bytes": (await self.client.get_media_repo_config()).upload_size}

    async def preview(self, url):
        return (await self.client.get_url_preview(url)).serialize()

    async def set_avatar(self, uri):
        await self.client.set_avatar_url(uri)

    async def avatar(self, user):
        return {"uri": await self.client.get_avatar_url(UserID(user))}


async def main(server):
    person = Person(server)
    await obey(person)
    await person.client.api.session.close()


asyncio.run(main(sys.argv[1]))
