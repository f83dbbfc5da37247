"""A simulated ComfyUI: python -m nodeagent.simulators.comfyui --port 8188.

It takes a part of the options of ComfyUI's `main.py`, opens its port when it is ready, and executes graphs of
a few nodes as the real one does, except that no picture is painted. `RUNG_SIM_CHECKPOINTS` lists its
checkpoints as `name=bytes`, separated by commas; by default there is one for each tier of image.
`RUNG_SIM_MODELS` lists the names of its other models: every folder of models has them all. See
`_settings` for the rest of the environment; `RUNG_SIM_LOAD_S` is the time to start and to read a checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import mimetypes
import os
import struct
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from nodeagent.simulators._comfyui_execution import Execution, Item
from nodeagent.simulators._comfyui_graph import validate
from nodeagent.simulators._comfyui_models import ModelCache
from nodeagent.simulators._comfyui_nodes import node_kinds
from nodeagent.simulators._faults import Fault, Faults, parse_faults
from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory, gpu_memory_from
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import Settings, settings_from
from nodeagent.simulators.gpu import SimulatedGpus

_VERSION = "0.3.64"
_GIB = 1024**3
_MIB = 1024**2
#: With a gigabyte to work on a picture of a megapixel they need 6, 12 and 20 GB.
_DEFAULT_CHECKPOINTS = {
    "sdxl_lightning_4step.safetensors": 5_000_000_000,
    "waiIllustriousSDXL_v140.safetensors": 11_000_000_000,
    "flux1-dev-fp8.safetensors": 19_000_000_000,
}
_START_S = 3.0
_FEATURES = {"supports_preview_metadata": True, "max_upload_size": 100 * _MIB}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--listen", default="127.0.0.1", nargs="?", const="0.0.0.0")  # noqa: S104 - as the real one
    add("--port", type=int, default=8188)
    add("--reserve-vram", type=float, default=0.4, help="GiB")
    for folder in ("output", "input", "temp", "base"):
        add(f"--{folder}-directory", default="")
    add("--preview-method", choices=("none", "auto", "latent2rgb", "taesd"), default="none")
    add("--disable-all-custom-nodes", action="store_true")
    add("--disable-api-nodes", action="store_true")
    amounts = parser.add_mutually_exclusive_group()
    for amount in ("gpu-only", "highvram", "lowvram", "novram", "cpu"):
        amounts.add_argument(f"--{amount}", action="store_true")
    return parser


class ComfyUi:
    """ComfyUI's routes, its WebSocket, and how it starts."""

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        settings: Settings,
        memory: GpuMemory | None,
        checkpoints: Mapping[str, int],
        models: tuple[str, ...] = (),
    ) -> None:
        self._settings = settings
        self._memory = None if options.cpu else memory
        self._faults = Faults(settings.faults)
        self._counters = Counters()
        self._kinds = node_kinds(tuple(checkpoints), models)
        self._files: dict[str, dict[str, bytes]] = {"input": {}, "output": {}, "temp": {}}
        #: Clients that can read whose preview it is.
        self._know_previews: set[str] = set()
        self._models = ModelCache(self._memory, int(options.reserve_vram * _GIB))
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._number = 0
        self._execution = Execution(
            models=self._models,
            checkpoints=checkpoints,
            settings=settings,
            faults=self._faults,
            counters=self._counters,
            send=self._send,
            send_preview=self._send_preview,
            kinds=self._kinds,
            files=self._files,
            previews=options.preview_method != "none",
        )
        self._listener = Listener(self._application(), options.listen, options.port)

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=100 * _MIB)
        for prefix in ("", "/api"):
            app.router.add_get(f"{prefix}/ws", self._socket)
            app.router.add_get(f"{prefix}/system_stats", self._system_stats)
            app.router.add_get(f"{prefix}/prompt", self._exec_info)
            app.router.add_post(f"{prefix}/prompt", self._prompt)
            app.router.add_get(f"{prefix}/queue", self._queue)
            app.router.add_post(f"{prefix}/queue", self._change_queue)
            app.router.add_post(f"{prefix}/interrupt", self._interrupt)
            app.router.add_post(f"{prefix}/free", self._free)
            app.router.add_get(f"{prefix}/object_info", self._object_info)
            app.router.add_get(f"{prefix}/object_info/{{node_class}}", self._object_info_of)
            app.router.add_post(f"{prefix}/upload/image", self._upload)
            app.router.add_get(f"{prefix}/view", self._view)
            app.router.add_get(f"{prefix}/history", self._history)
            app.router.add_post(f"{prefix}/history", self._change_history)
            app.router.add_get(f"{prefix}/history/{{prompt_id}}", self._history_of)
        app.router.add_get("/sim/state", self._state)
        app.router.add_post("/sim/faults", self._switch_faults)
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._counters, memory=self._memory
        )

    async def _live(self) -> None:
        if self._memory is not None:
            total = self._memory.total_bytes() // _MIB
            say(f"Total VRAM {total} MB, total RAM {_ram_total_bytes() // _MIB} MB")
        say("pytorch version: 2.9.0+simulated")
        load_s = self._settings.load_s
        await asyncio.sleep(_START_S / self._settings.speed if load_s is None else load_s)
        if Fault.DIE_WHILE_LOADING in self._faults:
            say("ModuleNotFoundError: No module named 'simulated_fault'")
            raise LoadFailedError
        try:
            self._models.open()
        except SimulatedOutOfMemory as error:
            say(f"torch.AcceleratorError: CUDA error: out of memory ({error})")
            raise LoadFailedError from error
        say("Import times for custom nodes:")
        await self._faults.wait_until_off(Fault.NEVER_READY)
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"OSError: {error}")
            raise LoadFailedError from None
        say("Starting server")
        say(f"To see the GUI go to: {url}")
        await self._execution.run_for_ever()

    # The WebSocket.

    async def _socket(self, http: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        client_id = http.query.get("clientId") or uuid.uuid4().hex
        self._sockets[client_id] = socket
        try:
            status = {"exec_info": {"queue_remaining": self._execution.remaining}}
            await _send(socket, "status", {"status": status, "sid": client_id})
            running = self._execution.running
            if running is not None and running.client_id == client_id and self._execution.node:
                await _send(socket, "executing", {"node": self._execution.node})
            first = True
            async for message in socket:
                if first and isinstance(message.data, str):
                    await self._greeted(socket, client_id, message.data)
                first = False
        finally:
            # As in the real one this also forgets a newer connection with the same id.
            self._sockets.pop(client_id, None)
            self._know_previews.discard(client_id)
        return socket

    async def _greeted(self, socket: web.WebSocketResponse, client_id: str, text: str) -> None:
        """What a client can do, if that is what it says first."""
        try:
            said = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError:
            return
        if said.get("type") == "feature_flags":
            if (said.get("data") or {}).get("supports_preview_metadata"):
                self._know_previews.add(client_id)
            await _send(socket, "feature_flags", _FEATURES)

    async def _send_preview(
        self, picture: bytes, place: Mapping[str, Any], client_id: str | None, *, first: bool
    ) -> None:
        if Fault.TELLS_NOTHING in self._faults or first != (client_id in self._know_previews):
            return
        if first:
            told = msgspec.json.encode({**place, "image_type": "image/png"})
            frame = struct.pack(">II", 4, len(told)) + told + picture
        else:
            frame = struct.pack(">II", 1, 2) + picture
        sockets = self._sockets
        for socket in (
            [sockets[client_id]] if client_id in sockets else [] if client_id else [*sockets.values()]
        ):
            with suppress(ConnectionError):
                await socket.send_bytes(frame)

    async def _send(self, event: str, data: Mapping[str, Any], client_id: str | None) -> None:
        if Fault.TELLS_NOTHING in self._faults:
            return
        if client_id is None:
            for socket in list(self._sockets.values()):
                await _send(socket, event, data)
        elif client_id in self._sockets:
            if event == "progress" and Fault.CUT_MID_STREAM in self._faults:
                await self._sockets.pop(client_id).close()
                return
            await _send(self._sockets[client_id], event, data)

    # Routes.

    async def _system_stats(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._faults:
            await asyncio.Event().wait()
        system = {
            "os": "posix",
            "ram_total": _ram_total_bytes(),
            "ram_free": _ram_free_bytes(),
            "comfyui_version": _VERSION,
            "python_version": sys.version,
            "pytorch_version": "2.9.0+simulated",
            "argv": sys.argv,
        }
        return json_response({"system": system, "devices": [self._device()]})

    def _device(self) -> dict[str, Any]:
        if self._memory is None:
            total, free = _ram_total_bytes(), _ram_free_bytes()
            figures = {"vram_total": total, "vram_free": free, "torch_vram_total": total}
            return {"name": "cpu", "type": "cpu", "index": None, **figures, "torch_vram_free": free}
        index, cached = self._memory.gpu_index, self._models.cached_bytes
        return {
            "name": f"cuda:{index} simulated",
            "type": "cuda",
            "index": index,
            "vram_total": self._memory.total_bytes(),
            # What PyTorch keeps counts as free here, though nobody else can have it.
            "vram_free": self._memory.free_bytes() + cached,
            "torch_vram_total": self._models.reserved_bytes,
            "torch_vram_free": cached,
        }

    async def _exec_info(self, http: web.Request) -> web.Response:
        return json_response({"exec_info": {"queue_remaining": self._execution.remaining}})

    async def _prompt(self, http: web.Request) -> web.Response:
        if Fault.HTTP_500 in self._faults:
            return web.Response(status=500, text="500 Internal Server Error (simulated fault)")
        asked = await _body(http)
        graph = asked.get("prompt")
        if not isinstance(graph, dict):
            return _refusal({"type": "no_prompt", "message": "No prompt provided"})
        prompt_id = asked.get("prompt_id") or str(uuid.uuid4())
        if not _is_canonical(prompt_id):
            return _refusal({"type": "invalid_prompt_id", "message": "prompt_id must be a canonical UUID"})
        found = validate(graph, self._kinds, self._files["input"])
        if found.error is not None:
            return _refusal(found.error, found.node_errors)
        number = asked.get("number", -self._number if asked.get("front") else self._number)
        self._number += 1
        extra_data = dict(asked.get("extra_data") or {})
        if "client_id" in asked:
            extra_data["client_id"] = asked["client_id"]
        await self._execution.submit(Item(number, prompt_id, graph, extra_data, found.outputs))
        return json_response({"prompt_id": prompt_id, "number": number, "node_errors": found.node_errors})

    async def _object_info(self, http: web.Request) -> web.Response:
        return json_response({name: kind.told(name) for name, kind in self._kinds.items()})

    async def _object_info_of(self, http: web.Request) -> web.Response:
        name = http.match_info["node_class"]
        kind = self._kinds.get(name)
        return json_response({} if kind is None else {name: kind.told(name)})

    async def _upload(self, http: web.Request) -> web.Response:
        form = await http.post()
        image = form.get("image")
        if not isinstance(image, web.FileField) or not image.filename:
            return web.Response(status=400)
        subfolder, folder = str(form.get("subfolder", "")), str(form.get("type", "input"))
        data = image.file.read()
        stem, dot, ending = image.filename.rpartition(".")
        name, tries = image.filename, 0
        stored = self._files[folder]
        while stored.get(_path(subfolder, name), data) != data and form.get("overwrite") not in ("true", "1"):
            tries += 1
            name = f"{stem} ({tries}){dot}{ending}"
        stored[_path(subfolder, name)] = data
        return json_response({"name": name, "subfolder": subfolder, "type": folder})

    async def _view(self, http: web.Request) -> web.Response:
        name = http.query.get("filename", "")
        if name.startswith("/") or ".." in name or not name:
            return web.Response(status=400 if name else 404)
        folder = self._files.get(http.query.get("type", "output"))
        if folder is None:
            return web.Response(status=400)
        data = folder.get(_path(http.query.get("subfolder", ""), name))
        if data is None:
            return web.Response(status=404)
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return web.Response(body=data, content_type=content_type)

    async def _queue(self, http: web.Request) -> web.Response:
        running = self._execution.running
        return json_response(
            {
                "queue_running": [] if running is None else [running.row()],
                "queue_pending": [item.row() for item in self._execution.pending],
            }
        )

    async def _change_queue(self, http: web.Request) -> web.Response:
        asked = await _body(http)
        if asked.get("clear"):
            await self._execution.drop(None)
        await self._execution.drop(set(asked.get("delete") or ()))
        return web.Response()

    async def _interrupt(self, http: web.Request) -> web.Response:
        asked = await _body(http) if http.can_read_body else {}
        self._execution.interrupt(asked.get("prompt_id"))
        return web.Response()

    async def _free(self, http: web.Request) -> web.Response:
        asked = await _body(http)
        self._execution.free(
            unload_models=bool(asked.get("unload_models")), free_memory=bool(asked.get("free_memory"))
        )
        return web.Response()

    async def _history(self, http: web.Request) -> web.Response:
        history = list(self._execution.history.items())
        newest = int(http.query.get("max_items", len(history)))
        return json_response(dict(history[max(len(history) - newest, 0) :]))

    async def _history_of(self, http: web.Request) -> web.Response:
        prompt_id = http.match_info["prompt_id"]
        found = self._execution.history.get(prompt_id)
        return json_response({} if found is None else {prompt_id: found})

    async def _change_history(self, http: web.Request) -> web.Response:
        asked = await _body(http)
        for prompt_id in list(self._execution.history) if asked.get("clear") else asked.get("delete") or ():
            self._execution.history.pop(prompt_id, None)
        return web.Response()

    async def _state(self, http: web.Request) -> web.Response:
        state = {"simulated": True, "engine": "ComfyUI", "ready": True, "models": self._models.names}
        return json_response(
            {**state, **msgspec.structs.asdict(self._counters), "faults": self._faults.names()}
        )

    async def _switch_faults(self, http: web.Request) -> web.Response:
        asked = await _body(http)
        try:
            self._faults.switch_to(parse_faults(asked.get("faults", [])))
        except ValueError as error:
            return json_response({"error": str(error)}, status=400)
        return json_response({"faults": self._faults.names()})


async def _send(socket: web.WebSocketResponse, event: str, data: Mapping[str, Any]) -> None:
    # Who has left misses it.
    with suppress(ConnectionError):
        await socket.send_str(msgspec.json.encode({"type": event, "data": data}).decode())


async def _body(http: web.Request) -> dict[str, Any]:
    """What was sent; the real one breaks over what is no JSON object, and so does this."""
    try:
        return msgspec.json.decode(await http.read(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        text = "500 Internal Server Error\n\nServer got itself in trouble"
        raise web.HTTPInternalServerError(text=text) from error


def _refusal(error: dict[str, Any], node_errors: Mapping[str, Any] | None = None) -> web.Response:
    whole = {"details": error["message"], "extra_info": {}, **error}
    return json_response({"error": whole, "node_errors": node_errors or {}}, status=400)


def _is_canonical(prompt_id: object) -> bool:
    try:
        return str(uuid.UUID(str(prompt_id))) == prompt_id
    except ValueError:
        return False


def _path(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def _ram_total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _ram_free_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _checkpoints(given: str | None) -> dict[str, int]:
    if not given:
        return _DEFAULT_CHECKPOINTS
    pairs = [part.strip().rpartition("=") for part in given.split(",") if part.strip()]
    return {name: int(size) for name, _, size in pairs}


async def _serve(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = settings_from(environment)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    comfyui = ComfyUi(
        options,
        settings=settings,
        memory=gpu_memory_from(gpus, environment),
        checkpoints=_checkpoints(environment.get("RUNG_SIM_CHECKPOINTS")),
        models=tuple(
            name.strip() for name in environment.get("RUNG_SIM_MODELS", "").split(",") if name.strip()
        ),
    )
    return await comfyui.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_to_end(lambda: _serve(options, os.environ), "main.py: error")


if __name__ == "__main__":
    sys.exit(main())
