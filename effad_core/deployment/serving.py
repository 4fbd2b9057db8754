"""Verdicts over HTTP, for programs that speak no Python.

    effad serve path/to/detector.safetensors --port 8000

    curl -F image=@part.png http://127.0.0.1:8000/predict
    curl -F image=@part.png http://127.0.0.1:8000/overlay --output part_overlay.png
    curl "http://127.0.0.1:8000/folder?path=today"      # with --images: a folder below that one

`/docs` is a page that describes and tries these calls, `/health` says which detector it is.
"""

import argparse
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Any

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.datasets import list_images
from effad_core.datasets.formats import SUFFIXES
from effad_core.deployment.overlays import bounding_boxes, overlay, scale_of
from effad_core.deployment.prepared import PreparedDetector, prepare
from effad_core.deployment.verdicts import table_cell
from effad_core.detector import EfficientAD
from effad_core.errors import DataError, RunError, command_errors, not_installed, printable
from effad_core.prediction import Prediction
from effad_core.storage.files import as_path
from effad_core.thresholds import OperatingPoint

from PIL import Image

LOCAL = ("127.0.0.1", "localhost")
MOST_BYTES = 64 * 2**20  # of one image's file
HEAD_BYTES = 2**16  # of a request, around the file
MOST_IMAGES = 1000  # of a folder, in one answer


def server(
    detector: PreparedDetector, images: Path | None = None, hosts: Sequence[str] = ("*",)
) -> Any:
    """The web application, a `fastapi.FastAPI`; `effad serve` runs it, and so does any ASGI server.

    Args:
        detector: prepared. It judges one image at a time; others wait.
        images: folders below this one may be judged where they lie; None: none may.
        hosts: names by which callers may call this machine, without the port; "*" is any.

    Raises:
        RunError: if FastAPI is not installed.
    """
    try:
        import python_multipart  # noqa: F401  FastAPI reads uploads with it
        from fastapi import FastAPI, File, HTTPException, Request, Response, UploadFile
        from fastapi.middleware.trustedhost import TrustedHostMiddleware
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise RunError(not_installed("effad serve", error.name or "fastapi", "serve")) from None
    app = FastAPI(title="EfficientAD", description="Finds anomalies in images.")
    # or a web page could let this machine's browser ask, by a name of its own
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    one_at_a_time = Lock()
    Upload = Annotated[UploadFile, File(description="an image file, as effad predict reads it")]

    @app.middleware("http")
    async def refuse_large(request: Request, call_next):
        """Before the body is read: it would be written to a disk first."""
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not length.isdecimal():
            return JSONResponse({"detail": "Send the image's Content-Length."}, 411)
        if length.isdecimal() and int(length) > MOST_BYTES + HEAD_BYTES:
            said = f"The image has more than {MOST_BYTES >> 20} MiB: send less."
            return JSONResponse({"detail": said}, 413)
        return await call_next(request)

    @app.exception_handler(ValueError)
    @app.exception_handler(OSError)
    def cannot(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"This cannot be judged: {printable(str(error))}"}, 500)

    @contextmanager
    def judged(upload: UploadFile) -> Iterator[tuple[Image.Image, Prediction]]:
        """The image and its prediction, while nobody else's is computed."""
        suffix = Path(upload.filename or "").suffix
        with TemporaryDirectory() as folder:  # as from a disk: 16 bits and all
            path = Path(folder, f"image{suffix if suffix.lower() in SUFFIXES else ''}")
            with path.open("wb") as file:
                shutil.copyfileobj(upload.file, file)
            with one_at_a_time:
                try:
                    found = next(detector.stream([path]))
                except DataError as error:
                    said = str(error).replace(str(path), upload.filename or "sent")
                    raise HTTPException(422, said) from None
                yield found

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Which detector answers here, and what its thresholds promise."""
        return {
            "image_size": list(detector.image_size),
            "precision": detector.precision,
            "device": str(detector.device),
            "threshold": _described(detector.operating_point),
            "pixel_threshold": _described(detector.pixel_operating_point),
        }

    @app.post("/predict")
    def predict(image: Upload) -> dict[str, Any]:
        """Judge one image."""
        with judged(image) as (_, prediction):
            return verdict(prediction)

    @app.post("/overlay", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def picture(image: Upload) -> Response:
        """The image under its anomaly map, as PNG."""
        file = io.BytesIO()
        with judged(image) as (shown, prediction):
            limit = prediction.pixel_threshold
            drawn = overlay(shown, prediction.map, scale_of(limit), limit)
            drawn.save(file, "PNG", compress_level=1)
        return Response(file.getvalue(), media_type="image/png")

    @app.get("/folder")
    def folder(path: str = "") -> list[dict[str, Any]]:
        """Judge the images of a folder below the one that the server was started with."""
        if images is None:
            raise HTTPException(403, "The server was started without --images: send the image.")
        place = _below(images, path)
        if place is None:
            raise HTTPException(403, "This is no folder below that of --images.")
        try:
            found = list_images(place, recursive=True)
        except DataError as error:
            raise HTTPException(422, _without(images, str(error))) from None
        root = images.resolve()
        paths = [path for path in found if path.resolve().is_relative_to(root)]  # links lead away
        if len(paths) > MOST_IMAGES:
            raise HTTPException(
                422, f"{len(paths)} images are more than {MOST_IMAGES}: use effad predict."
            )
        return list(_rows(detector, root, place, paths, one_at_a_time))

    return app


def _below(folder: Path, path: str) -> Path | None:
    """A folder below `folder`, links followed; None for one that is elsewhere."""
    parts = PureWindowsPath(path)  # knows both kinds of slashes, and drives
    if parts.anchor or ".." in parts.parts or "\0" in path:  # before the system is asked
        return None
    place = folder.joinpath(*parts.parts).resolve()
    return place if place.is_relative_to(folder.resolve()) else None


def _without(folder: Path, message: str) -> str:
    """An error message that does not tell where the folder lies."""
    for root in (folder.resolve(), folder):
        message = message.replace(str(root), "--images")
    return message


def _described(point: OperatingPoint | None) -> dict[str, Any] | None:
    return None if point is None else point.to_dict() | {"promise": str(point)}


def _rows(
    detector: PreparedDetector, root: Path, folder: Path, paths: Sequence[Path], lock: Lock
) -> Iterator[dict[str, Any]]:
    """One image at a time, so that others who ask meanwhile do not wait for the whole folder."""
    for path in paths:
        name = table_cell(path.relative_to(folder).as_posix())
        with lock:
            image, prediction = next(detector.stream([path], keep_going=True))
            if prediction is None:
                yield {"image": name, "error": table_cell(_without(root, str(image)))}
            else:
                yield {"image": name} | verdict(prediction)


def verdict(prediction: Prediction) -> dict[str, Any]:
    """Score, threshold, verdict, unit score, size and boxes, as JSON.

    Without a threshold is_anomalous and unit_score are None, without a pixel threshold the boxes.
    """
    judged = prediction.threshold is not None
    return {
        "score": prediction.score,
        "threshold": prediction.threshold,
        "is_anomalous": prediction.is_anomalous if judged else None,
        "unit_score": prediction.unit_score if judged else None,
        "height": prediction.size[0],
        "width": prediction.size[1],
        "boxes": None if prediction.pixel_threshold is None else bounding_boxes(prediction),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """`effad serve`."""
    parser = argparse.ArgumentParser(
        prog="effad serve",
        description="Answer over HTTP: POST /predict and /overlay, GET /folder and /health.",
        epilog="example: effad serve detector.safetensors, then: "
        "curl -F image=@part.png http://127.0.0.1:8000/predict",
    )
    parser.add_argument("detector", type=as_path, help="a detector.safetensors, or its folder")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1, this machine, without it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--images", type=as_path, help="folders below this one may be judged")
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(arguments)
    with command_errors("the server has ended"):
        if not 0 < args.port < 65536:
            raise ValueError(f"--port must be 1 to 65535, not {args.port}")
        if args.images is not None and not args.images.is_dir():
            raise DataError(f"{args.images} is no folder: name an existing one.")
        here = args.host in LOCAL
        prepared = prepare(EfficientAD.load(args.detector, args.device), args.device)
        app = server(prepared, args.images, LOCAL if here else ("*",))
        try:
            import uvicorn
        except ModuleNotFoundError:
            raise RunError(not_installed("effad serve", "uvicorn", "serve")) from None
        uvicorn.run(app, host=args.host, port=args.port)
