"""Records for the stores' tests: they never look into an adapter, so no files and no torch are needed."""

from sqlalchemy import text
from sqlalchemy.engine import Engine

from safegraft.contracts.adapter import Adapter, Compatibility, Origin, Servable
from safegraft.contracts.realignment import RealignmentCreate
from safegraft.ids import new_id
from safegraft.stores.jobs import Claim, JobStore

REFERENCE = "ref_" + "0" * 24
YES = Servable(ok=True)


def adapter(name: str = "mine") -> Adapter:
    return Adapter(
        id=new_id("adp"),
        name=name,
        base_model="tiny-llama",
        rank=4,
        alpha=8,
        target_modules=["q_proj"],
        modules=2,
        parameters=512,
        dtype="bfloat16",
        bytes=1024,
        sha256="0" * 64,
        files=[],
        dropped_files=[],
        compatibility=Compatibility(peft=YES, vllm=YES, lorax=YES, tgi=YES),
        origin=Origin(),
        created_at=1,
    )


def request(adapter_id: str = "adp_1", **values: object) -> RealignmentCreate:
    return RealignmentCreate.model_validate({"adapter_id": adapter_id, **values})


def queued(store: JobStore, tenant: str = "t", key: str | None = None) -> str:
    return store.create(tenant, REFERENCE, request(), key).job.id


def claimed(store: JobStore, worker: str = "w1", tenant: str = "t") -> Claim:
    claim = store.claim(queued(store, tenant), worker)
    assert claim is not None
    return claim


def kinds(store: JobStore, job_id: str, tenant: str = "t") -> list[str]:
    return [event.type for event in store.events(tenant, job_id)]


def shift(engine: Engine, job_id: str, column: str, seconds: float) -> None:
    """Moves one of a job's times, as if the clock had moved the other way."""
    with engine.begin() as connection:
        changed = connection.execute(
            text(f"UPDATE realignments SET {column} = {column} + :seconds WHERE id = :id"),
            {"seconds": seconds, "id": job_id},
        )
        assert changed.rowcount == 1
