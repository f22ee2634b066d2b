"""`tp-decoders serve`: a worker group on Ray, gRPC and HTTP in front of it, until told to stop.

Reads the command line and presets, has launch.serving.resolve_serve check them, and hands over to
launch.serving.run_server. Every setting of a preset can be given as a dotted override; the flags are short names of
the commonest.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from launch.observe import log_setup
from launch.presets import Layer, build, find, overrides, read
from launch.ray.private_ray import own_ray
from launch.ray.ray_config import ENVIRONMENT
from launch.serving.ray_loss import prompt_end
from launch.serving.serve_config import ServeConfig

FLAGS = {
    "model": "model",
    "task": "task",
    "adapter": "adapter",
    "tp": "parallel.tp",
    "dp": "parallel.dp",
    "device": "parallel.device",
    "dtype": "parallel.dtype",
    "host": "server.host",
    "port": "server.port",
    "http_port": "server.http_port",
    "chat_template": "server.chat_template",
    "state_dir": "server.state_dir",
    "kv_blocks": "engine.kv_blocks",
    "quantize": "engine.quantize",
    "metrics_port": "observe.metrics_port",
    "log_json": "placement.log_json",
    "ray_address": "ray.address",
    "oversubscribe": "ray.oversubscribe",
    "train": "training.enabled",
    "save_root": "training.save_root",
    "tls_cert": "server.tls.cert",
    "tls_key": "server.tls.key",
    "tls_client_ca": "server.tls.client_ca",
    "token_file": "server.token_file",
    "reflection": "limits.reflection",
    "insecure_listen_anywhere": "server.insecure_listen_anywhere",
}
"""Which setting a flag stands for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="the folder of a Hugging Face checkpoint, or ORG/NAME[@revision] of the hub"
    )
    parser.add_argument(
        "--adapter", metavar="ADAPTER",
        help="a PEFT LoRA adapter (a folder or ORG/NAME[@revision]), merged into the weights as they load",
    )  # fmt: skip
    parser.add_argument(
        "--task",
        help="causal-lm (default), sequence-classification, token-classification, question-answering or double-heads",
    )
    parser.add_argument("--tp", type=int, help="tensor-parallel ranks (default 1)")
    parser.add_argument("--dp", type=int, help="replicas of --tp ranks each, behind the one port (default 1)")
    parser.add_argument("--device", help="cpu (default) or cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's own)")
    parser.add_argument("--quantize", help="round the weights to int8 or int4 as they load: on CPUs, in bfloat16")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="port of gRPC (default 50051; 0: any free one)")
    parser.add_argument(
        "--http-port", type=_port, metavar="PORT",
        help="port of the OpenAI-compatible HTTP interface (default 8000 beside gRPC's default port, else none; 0: any "
        "free one; none: no HTTP)",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template of conversations (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--state-dir",
        metavar="FOLDER",
        help="survive this process's own death: what was asked and answered is kept there",
    )
    _add_security(parser)
    parser.add_argument("--kv-blocks", type=int, help="size of the key/value cache (default: from free memory)")
    parser.add_argument("--metrics-port", type=int, help="give Prometheus metrics there, to this machine (default: no)")
    parser.add_argument(
        "--ray-address", help="a standing Ray cluster, as in auto or HOST:6379 (default: start one here)"
    )
    parser.add_argument(
        "--oversubscribe", action="store_const", const=True,
        help="on CPUs: allow more ranks than there are cores (for trials: they share them, and are slow)",
    )  # fmt: skip
    parser.add_argument(
        "--train", action="store_const", const=True, help="let clients train the weights that serve (default: no)"
    )
    parser.add_argument("--save-root", metavar="FOLDER", help="where clients may save training states, by name")
    parser.add_argument("--preset", metavar="NAME", action="append", default=[], help="from configs/engine, or a path")
    parser.add_argument("--cluster", metavar="NAME", help="from configs/cluster, or a path")
    parser.add_argument(
        "overrides", nargs="*", metavar="name.name=value", help="any setting, as in engine.max_sequences=8"
    )
    log_setup.add_arguments(parser)


def _add_security(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-cert", metavar="FILE", help="the server's certificate chain (PEM): encrypt connections")
    parser.add_argument("--tls-key", metavar="FILE", help="its key; both are read again when they change")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="let in only clients with a certificate of this CA")
    parser.add_argument("--token-file", metavar="FILE", help="who may call and for what; see tp-decoders token --help")
    parser.add_argument(
        "--reflection", action=argparse.BooleanOptionalAction, help="gRPC reflection (default: on loopback only)"
    )
    parser.add_argument(
        "--insecure-listen-anywhere", action="store_const", const=True,
        help="listen where others can reach it even without TLS or without knowing who calls",
    )  # fmt: skip


def configuration(args: argparse.Namespace) -> ServeConfig:
    """Presets, then flags, then overrides; later ones win."""
    layers = [read(find(name, "engine")) for name in args.preset]
    if args.cluster is not None:
        layers.append(read(find(args.cluster, "cluster")))
    config = build(ServeConfig, [*layers, _flags(args), overrides(args.overrides)])
    assert isinstance(config, ServeConfig), "build makes what it was asked for"
    return config


def run(args: argparse.Namespace) -> int:
    level = log_setup.configure(args.verbose, args.log_json)
    config = configuration(args)
    for name, value in ENVIRONMENT.items():  # before Ray is imported, which reads some of them then
        os.environ.setdefault(name, value)
    with prompt_end() as leaving, own_ray(config.ray.address):
        from launch.serving.resolve_serve import resolve_serve

        server = resolve_serve(config, level)
        from launch.serving.run_server import serve  # brings in Ray, gRPC and torch

        return serve(server, leaving)


def _port(given: str) -> int | str:
    """A number, or a word that the setting knows."""
    return int(given) if given.isdecimal() else given


def _flags(args: argparse.Namespace) -> Layer:
    values: dict[str, Any] = {}
    for flag, setting in FLAGS.items():
        value = getattr(args, flag)
        if value is not None:
            *sections, name = setting.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    return Layer("command line", values)
