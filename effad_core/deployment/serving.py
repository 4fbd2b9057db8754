"""Verdicts over HTTP, for programs that speak no Python.

    effad serve path/to/detector.safetensors --port 8000

    curl -F image=@part.png http://127.0.0.1:8000/predict
    curl -F image=@part.png http://127.0.0.1:8000/overlay --output part_overlay.png
    curl "http://127.0.0.1:8000/folder?path=today"      # with --images: a folder below that one

`/docs` is a page that describes and tries these calls, `/health` says which detector it is.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Any

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.datasets import list_images
from effad_core.datasets.decoding import missing
from effad_core.datasets.formats import SUFFIXES
from effad_core.deployment.overlays import bounding_boxes, overlay
from effad_core.deployment.prepared import PreparedDetector, prepare
from effad_core.deployment.verdicts import UNKNOWN_SCALE
from effad_core.detector import EfficientAD
from effad_core.errors import DataError, RunError, command_errors, not_installed
from effad_core.prediction import Prediction
from effad_core.storage.files import as_path
from effad_core.thresholds import OperatingPoint

from PIL import Image

MOST_BYTES = 64 * 2**20  # of one image's file
MOST_IMAGES = 1000  # of a folder, in one answer


def server(detector: PreparedDetector, images: Path | None = None) -> Any:
    """The web application, a `fastapi.FastAPI`; `effad serve` runs it, and so does any ASGI server.

    Args:
        detector: prepared. It judges one image at a time; others wait.
        images: folders below this one may be judged where they lie; None: none may.

    Raises:
        RunError: if FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, File, HTTPException, Response, UploadFile
    except ModuleNotFoundError:
        raise RunError(not_installed("effad serve", "fastapi", "serve")) from None
    app = FastAPI(title="EfficientAD", description="Finds anomalies in images.")
    one_at_a_time = Lock()
    Upload = Annotated[UploadFile, File(description="an image file, as effad predict reads it")]

    def judged(upload: UploadFile) -> tuple[Image.Image, Prediction]:
        data = upload.file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise HTTPException(413, f"The image has more than {MOST_BYTES >> 20} MiB: send less.")
        suffix = Path(upload.filename or "").suffix
        with TemporaryDirectory() as folder:  # as from a disk: 16 bits and all
            path = Path(folder, f"image{suffix if suffix.lower() in SUFFIXES else ''}")
            path.write_bytes(data)
            try:
                with one_at_a_time:
                    return next(detector.stream([path]))
            except DataError as error:
                said = str(error).replace(str(path), upload.filename or "sent")
                raise HTTPException(422, said) from None

    @app.get("/health")
    def health() -> dict[str, Any]:
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
        return verdict(judged(image)[1])

    @app.post("/overlay", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def picture(image: Upload) -> Response:
        """The image under its anomaly map, as PNG."""
        shown, prediction = judged(image)
        limit = prediction.pixel_threshold
        scale = 2 * limit if limit is not None and limit > 0 else UNKNOWN_SCALE
        file = io.BytesIO()
        overlay(shown, prediction.map, scale, limit).save(file, "PNG", compress_level=1)
        return Response(file.getvalue(), media_type="image/png")

    @app.get("/folder")
    def folder(path: str = "") -> list[dict[str, Any]]:
        """Judge the images of a folder below the one that the server was started with."""
        if images is None:
            raise HTTPException(403, "The server was started without --images: send the image.")
        place = (images / path).resolve()
        if not place.is_relative_to(images.resolve()):
            raise HTTPException(403, "This is no folder below that of --images.")
        try:
            paths = list_images(place, recursive=True)
        except DataError as error:
            raise HTTPException(422, str(error)) from None
        if len(paths) > MOST_IMAGES:
            raise HTTPException(
                422, f"{len(paths)} images are more than {MOST_IMAGES}: use effad predict."
            )
        return list(_rows(detector, place, paths, one_at_a_time))

    return app


def _described(point: OperatingPoint | None) -> dict[str, Any] | None:
    return None if point is None else point.to_dict() | {"promise": str(point)}


def _rows(
    detector: PreparedDetector, folder: Path, paths: Sequence[Path], lock: Lock
) -> Iterator[dict[str, Any]]:
    """One image at a time, so that others who ask meanwhile do not wait for the whole folder."""
    for path in paths:
        with lock:
            image, prediction = next(detector.stream([path], keep_going=True))
        row = {"image": path.relative_to(folder).as_posix()}
        yield row | ({"error": str(image)} if prediction is None else verdict(prediction))


def verdict(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON: the columns of `inspect_images`, and boxes.

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
        if args.images is not None and (why := missing(args.images)):
            raise DataError(f"The folder {args.images} {why}: name an existing one.")
        app = server(
            prepare(EfficientAD.load(args.detector, args.device), args.device), args.images
        )
        try:
            import uvicorn
        except ModuleNotFoundError:
            raise RunError(not_installed("effad serve", "uvicorn", "serve")) from None
        uvicorn.run(app, host=args.host, port=args.port)
