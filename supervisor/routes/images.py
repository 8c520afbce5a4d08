"""Stored pictures by name; with the disk strategy, what `store_images` left behind."""

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from supervisor.operations import Operation, storage_of


async def show(request: Request) -> Response:
    path, media_type = await storage_of(request).open_image(request.path_params["name"])
    # A stored picture is never overwritten, so a copy of it stays true.
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return FileResponse(path, media_type=media_type, headers=headers)


PICTURE = {"type": "string", "contentEncoding": "binary"}
OPERATIONS = [
    Operation(method="GET", path="/images/{name}", endpoint=show, tag="images",
              summary="A stored picture", answer=PICTURE, errors=("not_found",),
              media_type="image/*"),
]  # fmt: skip
