"""What a card says of how a set was measured, and of the set: what must match for a comparison, and what need not.

MeasuredSet --> protocol_of_set (must match), about_set (guidance, seeds, warnings, what was not measured)
"""

from collections import Counter
from typing import Any

from arra.evaluate.card import ASKED, CLASS_BALANCE, DUPLICATES, WARNINGS, ProtocolValue, asked_hash
from arra.evaluate.spaces import INCEPTION_FILE, InceptionSpace
from arra.report.card_page import NOT_MEASURED
from arra.runs import environment
from arra.stages.picture_folders import class_balance
from arra.stages.set_measures import MeasuredSet
from arra.stages.set_subjects import known_teachers

IMAGENET = "imagenet-256"


def protocol_of_set(measured: MeasuredSet) -> dict[str, ProtocolValue]:
    """What must be the same on two cards for their numbers to be compared."""
    opened, options, seen = measured.opened, measured.options, measured.seen
    protocol, reference = opened.plan.protocol, opened.reference
    labels = opened.pictures.labels
    found: dict[str, ProtocolValue] = {
        "protocol": protocol.name,
        "num_images": seen.count,
        "picture_size": ", ".join(sorted(seen.shapes)),
        "resize": opened.pictures.resize,
        "class_balance": "unknown" if labels is None else class_balance(labels),
        "split": measured.split,
    }
    if reference is not None and reference.pictures is not None:
        found["reference_sha256"] = reference.pictures.content_hash()
        found["reference_images"] = len(reference.pictures)
        found["reference_resize"] = reference.pictures.resize
    if reference is not None and reference.statistics is not None:
        found["reference_statistics_sha256"] = reference.statistics.sha256
    if opened.training is not None:
        found["training_sha256"] = opened.training.content_hash()
    for name, space in opened.spaces.items():
        found[f"{name}_sha256"], found[f"{name}_input"] = space.weights_sha256, space.resize
    for name in opened.agreements:
        found[f"{name}_prefix"] = protocol.prefix
    metrics = {each.metric for each in opened.plan.measures}
    if metrics & {"precision", "recall", "density", "coverage"}:
        found["k"], found["num_reference"] = protocol.k, protocol.num_reference or "all"
    if "inception_score" in metrics:
        found["is_split"] = protocol.is_split
    if options.findings is not None:
        found["findings"] = "table"
    return found | {"num_resamples": options.num_resamples, "seed": options.seed}


def about_set(measured: MeasuredSet) -> dict[str, Any]:
    """What is known of the set and of this evaluation."""
    opened, options, seen = measured.opened, measured.options, measured.seen
    pictures, reference = opened.pictures, opened.reference
    teachers = known_teachers(measured.subject, options.teachers)
    found: dict[str, Any] = {key: value for key, value in pictures.about.items() if key != CLASS_BALANCE}
    found |= {
        "teachers": "not known" if teachers is None else ", ".join(teachers) or "none",
        "reference": None if reference is None else reference.name,
        "training": None if opened.training is None else opened.training.name,
        ASKED: asked_hash(pictures.prompts, pictures.labels),
        DUPLICATES: seen.num_duplicates,
        "content_sha256": pictures.content_hash(),
        "intervals": "95 %, bootstrap over generated pictures (recall, coverage: the reference's) alone",
    }
    if pictures.labels is not None:
        found[CLASS_BALANCE] = {str(label): count for label, count in sorted(Counter(pictures.labels).items())}
    if measured.reference is not None:
        found["identical_to_reference_pictures"] = seen.shared_with(measured.reference)
    if measured.training is not None:
        found["identical_to_training_pictures"] = seen.shared_with(measured.training)
    if measured.copies:
        found["copied_expected"] = {space: one.expected for space, one in measured.copies.items()}
    if opened.plan.protocol.differs:
        found["protocol_and_paper"] = list(opened.plan.protocol.differs)
    left = {name: "left out by --without" for name in opened.plan.left_out}
    found[NOT_MEASURED] = opened.not_measured | left
    found[WARNINGS] = _warnings(measured)
    return {key: value for key, value in found.items() if value is not None or key == ASKED} | environment()


def _warnings(measured: MeasuredSet) -> list[str]:
    """What must be known before a number is read, a sentence each."""
    opened, seen = measured.opened, measured.seen
    protocol, about = opened.plan.protocol, opened.pictures.about
    found = []
    if protocol.num_images is not None and seen.count != protocol.num_images:
        found.append(
            f"{protocol.name} is told for {protocol.num_images:,} pictures, these are {seen.count:,}: the numbers do "
            "not compare with published ones."
        )
    if len(seen.shapes) > 1:
        found.append(
            f"Pictures of {len(seen.shapes)} sizes: {', '.join(seen.shapes)}. Every network resizes them its way."
        )
    if about.get("jpeg_files"):
        found.append(f"{about['jpeg_files']:,} pictures are JPEG files: their compression moves a FID by itself.")
    if about.get("same_condition_and_seed"):
        found.append(f"{about['same_condition_and_seed']:,} pictures have condition and seed of another one.")
    for space in opened.spaces.values():
        if isinstance(space, InceptionSpace) and not space.is_published:
            found.append(
                f"Inception's weights are not the published ones ({INCEPTION_FILE}): these numbers are no FID that "
                "anyone else has."
            )
    prompts = opened.pictures.prompts
    for name, agreement in opened.agreements.items():
        if prompts is not None and (cut := agreement.num_cut(prompts)):
            found.append(f"{name} reads {agreement.context} tokens: the ends of {cut:,} prompts do not count.")
    same = 0 if measured.reference is None else seen.shared_with(measured.reference)
    if same:
        found.append(f"{same:,} pictures are the reference's own, pixel by pixel: is the reference what was generated?")
    reference = opened.reference
    if protocol.name == IMAGENET and (reference is None or reference.statistics is None):
        found.append(
            "Published numbers are against the statistics of the training pictures (VIRTUAL_imagenet256_labeled.npz); "
            "this reference has none. The validation pictures against it give FID 1.68."
        )
    if protocol.per_class is not None and opened.pictures.labels is None:
        found.append("Nobody says which classes the pictures are of: whether they are balanced is not known.")
    return found
