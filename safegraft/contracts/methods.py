"""Parameters of the repair methods: one model a method, and their union, told apart by `type`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NlsrParameters(Parameters):
    """Neuron-level safety realignment (arXiv 2412.12497): transplant safety-critical neurons into damaged modules."""

    type: Literal["nlsr"] = "nlsr"
    form: Literal["auto", "factor", "paper", "neuron"] = Field(
        default="auto",
        description="What is transplanted. `factor`: masked entries of A and of B (as published code does). `paper`: "
        "the masked product without cross terms, recompressed to the adapter's rank. `neuron`: whole output rows; the "
        "only form for adapters that were not continued from the aligned adapter. `auto`: `factor` for continued "
        "adapters, `neuron` for the others.",
    )
    selection: Literal["lowest", "bernoulli"] = Field(
        default="lowest",
        description="Which modules are repaired: those with the lowest similarity, or a seeded draw that favours them.",
    )
    skip_share: float = Field(default=0.5, ge=0.0, le=1.0, description="P_L: the share of modules left alone.")
    spread: float = Field(
        default=0.4,
        ge=0.0,
        le=1.0,
        description="Only for `bernoulli`: how far the probability of being skipped rises from the least to the most "
        "similar module, centred on `skip_share`.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Only for `bernoulli`.")


class GramParameters(Parameters):
    """Activation-weighted transplant: like the reference on safety prompts' inputs, like the customer elsewhere."""

    type: Literal["gram"] = "gram"
    general_weight: float = Field(
        default=0.3,
        ge=1e-2,
        le=1e3,
        description="λ in K = C_s(C_s + λC_g)⁻¹: how much the customer's behaviour on general inputs counts against "
        "the reference's on safety inputs. Smaller repairs more and costs more of the fine-tuning.",
    )


MethodParameters = Annotated[NlsrParameters | GramParameters, Field(discriminator="type")]
METHOD_PARAMETERS: TypeAdapter[NlsrParameters | GramParameters] = TypeAdapter(MethodParameters)
MODELS: dict[str, type[Parameters]] = {"nlsr": NlsrParameters, "gram": GramParameters}
DEFAULT_METHOD = "nlsr"
