"""The cloud providers' own descriptions of a machine, as JSON Schema, for test_ray_files: nothing is left free.

`python -m tests.launch.ray.provider_models` writes them anew from the packages botocore and google-api-python-client,
which the tests do not need. Kept are the shapes that a node's configuration can reach, without their documentation.
"""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "data/provider-models"
EC2, GCP = FOLDER / "aws-ec2-run-instances.json", FOLDER / "gcp-compute-instance.json"
EC2_TYPES = {"string": "string", "integer": "integer", "long": "integer", "double": "number", "float": "number",
             "boolean": "boolean", "timestamp": "string", "blob": "string"}  # fmt: skip


def from_botocore(model: dict[str, Any]) -> dict[str, Any]:
    """RunInstances' input and every shape below it."""
    shapes, wanted, definitions = model["shapes"], ["RunInstancesRequest"], {}
    while wanted:
        name = wanted.pop()
        if name in definitions:
            continue
        definitions[name] = _ec2_shape(shapes[name])
        wanted += _references(definitions[name])
    return {"$ref": "#/$defs/RunInstancesRequest", "$defs": dict(sorted(definitions.items()))}


def _ec2_shape(shape: dict[str, Any]) -> dict[str, Any]:
    kind = shape["type"]
    if kind == "structure":
        members = {name: {"$ref": f"#/$defs/{member['shape']}"} for name, member in shape["members"].items()}
        required = {"required": shape["required"]} if shape.get("required") else {}
        return {"type": "object", "properties": members, "additionalProperties": False, **required}
    if kind == "list":
        return {"type": "array", "items": {"$ref": f"#/$defs/{shape['member']['shape']}"}}
    allowed = {"enum": shape["enum"]} if shape.get("enum") else {}
    return {"type": EC2_TYPES[kind], **allowed}


def from_discovery(schemas: dict[str, Any]) -> dict[str, Any]:
    """An instance and every schema below it."""
    wanted, definitions = ["Instance"], {}
    while wanted:
        name = wanted.pop()
        if name in definitions:
            continue
        definitions[name] = _gcp_schema(schemas[name])
        wanted += _references(definitions[name])
    return {"$ref": "#/$defs/Instance", "$defs": dict(sorted(definitions.items()))}


def _gcp_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        members = {name: _gcp_schema(member) for name, member in schema["properties"].items()}
        return {"type": "object", "properties": members, "additionalProperties": False}
    if kind == "object":
        return {"type": "object", "additionalProperties": _gcp_schema(schema.get("additionalProperties", {}))}
    if kind == "array":
        return {"type": "array", "items": _gcp_schema(schema["items"])}
    if schema.get("format") in ("int64", "uint64"):
        return {"type": ["string", "integer"]}
    allowed = {"enum": schema["enum"]} if schema.get("enum") else {}
    return {**({} if kind in (None, "any") else {"type": kind}), **allowed}


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema and isinstance(schema["$ref"], str) else []
        return own + [name for value in schema.values() for name in _references(value)]
    return [name for value in schema for name in _references(value)] if isinstance(schema, list) else []


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    ec2 = sorted(Path(str(files(import_module("botocore")))).glob("data/ec2/*/service-2.json.gz"))[-1]
    EC2.write_text(_compact(from_botocore(json.loads(gzip.decompress(ec2.read_bytes())))))
    documents = files(import_module("googleapiclient")) / "discovery_cache/documents"
    schemas = json.loads((documents / "compute.v1.json").read_text(encoding="utf-8"))["schemas"]
    GCP.write_text(_compact(from_discovery(schemas)))


def _compact(schema: dict[str, Any]) -> str:
    return json.dumps(schema, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    main()
