"""The OpenAPI description of the HTTP API, with the request bodies that the routes validate themselves."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

import fedamole

REFERENCE = "#/components/schemas/{model}"


def describe_bodies(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Add the schemas of request bodies, by route, to what `app` serves as /openapi.json."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = get_openapi(title=app.title, version=fedamole.__version__, routes=app.routes)
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            for route, body in bodies.items():
                schema = body.model_json_schema(ref_template=REFERENCE)
                schemas.update(schema.pop("$defs", {}))
                schemas[body.__name__] = schema
                content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body.__name__)}}}
                description["paths"][route]["post"]["requestBody"] = {"required": True, "content": content}
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
