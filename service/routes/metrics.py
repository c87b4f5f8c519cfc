"""/metrics: for Prometheus."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.dependencies import AdminTenant, Here
from service.errors import Forbidden

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Read the metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(request: Request, here: Here, tenant: AdminTenant) -> Response:
    """Numbers about this process and the whole installation, for Prometheus. Needs a key with the scope `admin`."""
    if here.settings.metrics_tenant not in ("", tenant):
        raise Forbidden("Metrics tell of all tenants; this key is not the operator's.", param="Authorization")
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.metrics.registry), media_type=kind)
