"""What the page asks while someone types: JSON in, lines of JSON out, beside Gradio and not through its queue.

A keystroke through Gradio's queue costs about 40 ms of Python, as much as a picture of the miniature, and in the
interpreter that draws it. A request here costs two or three.
"""

import io
import json
import random
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import anyio
from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from perflow_diffusers.app import views
from perflow_diffusers.app.code import as_python
from perflow_diffusers.app.desk import DeskError, Ticket, sentence
from perflow_diffusers.app.drawing import fit
from perflow_diffusers.app.hosts import LOOPBACK
from perflow_diffusers.app.pictures import MAX_BYTES, PictureError, check_upload, from_png
from perflow_diffusers.app.room import Room, described
from perflow_diffusers.app.settings import Settings
from perflow_diffusers.app.studio import Studio
from perflow_diffusers.miniature import miniature_prompts, unknown_words_sentence

#: the settings that have a control on the page
NAMES = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "accelerator_scale",
    "stock",
    "stock_steps",
    "stock_guidance_scale",
    "strength",
)
FIRST = "a happy person with red hair and glasses"  # prompt of a page that has just come, for the miniature
STRENGTH = 0.7  # of image to image
CANVAS = 256  # pixels at least of the shorter side of a picture to begin from
MAX_WINDOWS = 256  # whose numbers and pictures are remembered
MAX_JSON = 100_000  # bytes
BEGIN = "Upload a picture or draw one to begin from."


class Live:
    """The routes of one room. `may_open`: whether visitors may have another model loaded."""

    def __init__(self, room: Room, may_open: bool = True) -> None:
        self.room, self.may_open = room, may_open
        self.instance = secrets.token_hex(8)  # tells a page that the server was started anew
        self._newest: OrderedDict[str, int] = OrderedDict()  # the newest wish of a window: requests may overtake
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._threads: anyio.CapacityLimiter | None = None

    def routes(self, prefix: str = "/perflow") -> list[BaseRoute]:
        """For a Starlette application."""
        return [
            Route(f"{prefix}/status", self.status, methods=["GET"]),
            Route(f"{prefix}/suggest", self.suggest, methods=["GET"]),
            Route(f"{prefix}/draw", self.draw, methods=["POST"]),
            Route(f"{prefix}/image", self.image, methods=["POST"]),
            Route(f"{prefix}/settings", self.settings, methods=["POST"]),
            Route(f"{prefix}/open", self.open, methods=["POST"]),
            Route(f"{prefix}/leave", self.leave, methods=["POST"]),
        ]

    async def status(self, request: Request) -> Response:
        """The model, whether it is there, and what to begin with."""
        room = self.room
        studio = room.studio
        said: dict[str, Any] = {"instance": self.instance, "state": room.state, "text": room.status}
        said |= {"number": room.number, "about": "no model yet", "values": None}
        if studio is not None:
            said |= {"about": described(studio), "values": beginning(studio), "canvas": canvas_size(studio)}
        return JSONResponse(said, headers={"Cache-Control": "no-store"})

    async def suggest(self, request: Request) -> Response:
        """A prompt of pictures that no training has seen."""
        studio = self.room.studio
        checkpoint = studio.model if studio is not None and studio.is_miniature else "avatars"
        prompt = miniature_prompts(1, random.randrange(2**31), checkpoint)[0]
        return JSONResponse({"prompt": prompt}, headers={"Cache-Control": "no-store"})

    async def draw(self, request: Request) -> Response:
        """A wish: `window`, its `number`, `mode` ("text" or "image") and the `values` of `NAMES`.

        Answers lines: {"kind": "picture" | "comparison" | "states" | "failed" | "superseded", ...}, as they come.
        """
        try:
            wish = await _json(request)
            window, number = _window(wish.get("window")), wish.get("number")
            if not isinstance(number, int) or not isinstance(wish.get("values"), list):
                raise ValueError("The request is none of this page's.")
            if number <= self._newest.get(window, -1):
                return _lines([{"kind": "superseded"}])
            _remember(self._newest, window, number)
            settings, image = self._wish(window, wish)
            ticket = self.room.draw(window, settings, image)
        except _Refused as refused:
            return refused.response
        except (ValueError, DeskError) as error:
            text = sentence(error)
            return _lines([{"kind": "failed", "text": text, "missing": text == BEGIN}])
        return StreamingResponse(
            self._answer(window, number, ticket, image is not None), media_type="application/x-ndjson"
        )

    def _wish(self, window: str, wish: Mapping[str, Any]) -> tuple[Settings, Image.Image | None]:
        said = settings_of(wish["values"])
        if self.room.studio is None:
            raise ValueError("There is no model yet.")
        if wish.get("mode") != "image":
            said["strength"] = None
            return Settings.from_dict(said), None
        settings = Settings.from_dict(said)
        if window not in self._images:
            raise ValueError(BEGIN)
        self._images.move_to_end(window)
        return settings, self._images[window]

    async def _answer(self, window: str, number: int, ticket: Ticket, from_image: bool) -> AsyncIterator[bytes]:
        """The events of a ticket as lines; whoever hangs up before the end frees the place."""
        done = False
        try:
            while True:
                event = await self._in_thread(ticket.events.get)
                if event is None:
                    break
                yield _line(await self._in_thread(self._said, *event, from_image))
            done = True
        finally:
            if not done and self._newest.get(window) == number:
                self.room.desk.leave(window)

    async def _in_thread(self, call: Any, *args: Any) -> Any:
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(200)
        return await anyio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=self._threads)

    def _said(self, kind: str, what: Any, from_image: bool) -> dict[str, Any]:
        studio = self.room.studio
        if kind == "picture" and studio is not None:
            words = unknown_words_sentence(what.settings.prompt, studio.model) if studio.is_miniature else ""
            note = " ".join([words, *what.notes]).strip()
            code = as_python(what.settings, studio, "input.png" if from_image else None)
            return {"kind": kind, **views.accelerated(what, studio), "note": note, "code": code}
        if kind == "comparison" and studio is not None:
            return {"kind": kind, **views.comparison(what, studio)}
        if kind == "states":
            return {"kind": kind, "states": [views.state(picture) for picture in what]}
        return {"kind": kind, "text": what}

    async def image(self, request: Request) -> Response:
        """A picture to begin from, as its bytes; kept for its `window`, and answered as a PNG of the canvas' size."""
        try:
            window = _window(request.query_params.get("window"))
            data = await _body(request, MAX_BYTES)
            png = await self._in_thread(self._keep, window, data)
        except _Refused as refused:
            return refused.response
        except ValueError as error:
            return _sorry(sentence(error))
        return Response(png, media_type="image/png")

    def _keep(self, window: str, data: bytes) -> bytes:
        studio = self.room.studio
        if studio is None:
            raise ValueError(self.room.status)
        picture = fit(check_upload(data), *canvas_size(studio))
        _remember(self._images, window, picture)
        out = io.BytesIO()
        picture.save(out, "PNG", compress_level=1)
        return out.getvalue()

    async def settings(self, request: Request) -> Response:
        """The values of the controls that a PNG carries."""
        try:
            data = await _body(request, MAX_BYTES)
            settings = (await self._in_thread(from_png, data)).to_dict()
        except _Refused as refused:
            return refused.response
        except ValueError as error:
            return _sorry(sentence(error))
        return JSONResponse({"values": [settings[name] for name in NAMES]})

    async def open(self, request: Request) -> Response:
        """Open another model for all windows."""
        try:
            wish = await _json(request)
            # the name asked for, too: another site's may have been made to point here
            if not self.may_open or request.url.hostname not in LOOPBACK:
                raise ValueError("Other models are opened where the server runs, not over the network.")
            model, accelerator = (str(wish.get(name) or "").strip() for name in ("model", "accelerator"))
            if not model:
                raise ValueError("Name a model: a folder, a Hub id or a .safetensors file.")
            self.room.open(model, accelerator or None)
        except _Refused as refused:
            return refused.response
        except (ValueError, DeskError) as error:
            return _sorry(sentence(error))
        return JSONResponse({"text": self.room.status})

    async def leave(self, request: Request) -> Response:
        """A window was closed: its work ends, its picture goes."""
        try:
            _check_origin(request)
            window = _window(request.query_params.get("window"))
        except _Refused as refused:
            return refused.response
        except ValueError as error:
            return _sorry(sentence(error))
        self.room.desk.leave(window)
        self._newest.pop(window, None)
        self._images.pop(window, None)
        return Response(status_code=204)


def settings_of(values: list[Any]) -> dict[str, Any]:
    """The settings that the controls' values say. An emptied seed is 0. ValueError for a wrong number."""
    if len(values) != len(NAMES):
        raise ValueError("This page is of another version. Load it again.")
    said = dict(zip(NAMES, values, strict=True))
    said["seed"] = 0 if said["seed"] is None else said["seed"]
    said["negative_prompt"] = said["negative_prompt"] or ""
    said["prompt"] = said["prompt"] or ""
    return said


def beginning(studio: Studio) -> list[Any]:
    """Values of the controls for a model that is new to a page."""
    said = studio.defaults().to_dict() | {"strength": STRENGTH, "prompt": FIRST if studio.is_miniature else ""}
    return [said[name] for name in NAMES]


def canvas_size(studio: Studio) -> tuple[int, int]:
    """Width and height of a picture to begin from: the model's, a whole factor larger if that is small."""
    width, height = studio.size
    factor = max(1, -(-CANVAS // min(width, height)))
    return width * factor, height * factor


class _Refused(Exception):
    def __init__(self, text: str, status: int) -> None:
        self.response = _sorry(text, status)


def _sorry(text: str, status: int = 400) -> JSONResponse:
    return JSONResponse({"text": text}, status)


def _line(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said, ensure_ascii=False).encode() + b"\n"


def _lines(said: list[dict[str, Any]]) -> Response:
    return Response(b"".join(map(_line, said)), media_type="application/x-ndjson")


def _remember(kept: OrderedDict[str, Any], window: str, what: Any) -> None:
    kept[window] = what
    kept.move_to_end(window)
    while len(kept) > MAX_WINDOWS:
        kept.popitem(last=False)


def _window(name: Any) -> str:
    """The name that a window gave itself; long enough that no other guesses it."""
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{32}", name):
        raise ValueError("The request is none of this page's.")
    return name


def _check_origin(request: Request) -> None:
    """Pages of other sites may not have pictures drawn here."""
    origin = request.headers.get("origin")
    hosts = (request.headers.get("host"), request.headers.get("x-forwarded-host"))
    if origin is not None and urlsplit(origin).netloc not in hosts:
        raise _Refused("Requests of other sites are refused.", 403)


async def _body(request: Request, limit: int) -> bytes:
    _check_origin(request)
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise PictureError(f"The file is larger than {limit // 2**20} MB.")
    except ClientDisconnect:
        raise _Refused("The window has gone.", 400) from None
    return bytes(data)


async def _json(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise _Refused("JSON was expected.", 415)
    try:
        said = json.loads(await _body(request, MAX_JSON))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, PictureError):
        raise _Refused("JSON was expected.", 400) from None
    if not isinstance(said, dict):
        raise _Refused("A JSON object was expected.", 400)
    return said
