"""``python -m pipeline.local.worker``: one Python worker of Beam, in place of its container.

Keeps the contract of the program in Beam's SDK images: it gets the addresses of its runner, asks
it for the pipeline's options and runs Beam's worker with them. What images do besides, installing
what the pipeline staged, is left out: workers here run in the pipeline's own environment.
"""

from __future__ import annotations

import argparse
import os
import sys

import grpc
from apache_beam.portability.api import (
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    endpoints_pb2,
)
from apache_beam.runners.worker import sdk_worker_main
from google.protobuf import json_format, text_format


def main(arguments: list[str] | None = None) -> None:
    """Run the worker until its runner ends it."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.local.worker")
    parser.add_argument("--id", required=True)
    for name in ("provision", "control", "logging", "artifact"):
        parser.add_argument(f"--{name}_endpoint", required=True, metavar="HOST:PORT")
    options = parser.parse_args(arguments)
    with grpc.insecure_channel(options.provision_endpoint) as channel:
        service = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        request = beam_provision_api_pb2.GetProvisionInfoRequest()
        # The runner knows a worker by the id in the call.
        info = service.GetProvisionInfo(request, metadata=[("worker_id", options.id)]).info
    os.environ |= {
        "WORKER_ID": options.id,
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
        "CONTROL_API_SERVICE_DESCRIPTOR": _descriptor(options.control_endpoint),
        "LOGGING_API_SERVICE_DESCRIPTOR": _descriptor(options.logging_endpoint),
    }
    sdk_worker_main.main(sys.argv)


def _descriptor(address: str) -> str:
    return text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=address))


if __name__ == "__main__":
    main()
