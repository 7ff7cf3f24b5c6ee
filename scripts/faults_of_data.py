"""Known faults in rewards, in prompt files and in what pipelines make of them; see `faults.py`."""

from __future__ import annotations

from fault import Fault

FAULTS = (
    Fault(
        name="a flagged picture is black, and scored",
        file="rollout/lifting/loop.py",
        right="**proxies, **self.unchecked, ",
        wrong="**proxies, ",
        tests="tests/rollout/test_pipeline.py -k flagged",
    ),
    Fault(
        name="a picture is left out of the start",
        file="rollout/lifting/prepare.py",
        right="            base=state,\n",
        wrong="            base=None,\n",
        tests="tests/rollout/test_inputs.py",
    ),
    Fault(
        name="the loop keeps the noise of the probe",
        file="rollout/lifting/conditioning.py",
        right="own = {key: noise.to(self.values[key]) for key in self.noise_names}",
        wrong="own = {}",
        tests="tests/rollout/test_inputs.py",
    ),
    Fault(
        name="the frames of a sample are taken as blocks",
        file="rollout/lifting/conditioning.py",
        right="return best if distance(best) < 0.1 * distance(self) else self",
        wrong="return self",
        tests="tests/rollout/test_zoo.py -k animatediff",
    ),
    Fault(
        name="rows are taken together that do not go together",
        file="rollout/lifting/prepare.py",
        right="if row.inputs and (reason := self._stumbles",
        wrong="if not row.inputs and (reason := self._stumbles",
        tests="tests/rollout/test_zoo.py -k motif_video_i2v",
    ),
    Fault(
        name="ControlNets are trained",
        file="rollout/lifting/loop.py",
        right='GUIDES = ("controlnet", "adapter")',
        wrong='GUIDES = ("none",)',
        tests="tests/whole/test_pictures.py -k sd_controlnet",
    ),
    Fault(
        name="a source is drawn as often as every other",
        file="rollout/data/batches.py",
        right="for source, weight in enumerate(weights) for _ in range(weight)]",
        wrong="for source, _ in enumerate(weights)]",
        tests="tests/rollout/test_prompts.py -k by_its_weight",
    ),
    Fault(
        name="the mask is compared, and what is outside of it left out",
        file="rewards/scorers/edit_consistency.py",
        right="_resized(mask, image) < HALF",
        wrong="_resized(mask, image) >= HALF",
        tests="tests/rewards/test_edit_consistency.py -k TestMask",
    ),
    Fault(
        name="the pictures of a batch are those of its first samples",
        file="rewards/hosts/worker.py",
        right="[None if row is None else arrays[row] for row in given",
        wrong="[None if row is None else arrays[0] for row in given",
        tests="tests/rewards/test_pictures.py -k pixels_arrive",
    ),
    Fault(
        name="frames of all videos are mixed",
        file="rewards/frames.py",
        right="values[count * row : count * (row + 1)]",
        wrong="values[row::size]",
        tests="tests/rewards/test_frames.py",
    ),
    Fault(
        name="latents of pictures stay where the autoencoder has them",
        file="rollout/lifting/epilogue.py",
        right="torch.empty_like(values).scatter_(0, self.source, values)",
        wrong="values",
        tests="tests/rollout/test_encode.py -k FluxPipeline",
    ),
    Fault(
        name="kept encodings of other weights are taken",
        file="rollout/lifting/encode.py",
        right='said = f"{self._hash(autoencoder)} ',
        wrong='said = f"',
        tests="tests/rollout/test_encode.py -k other_weights",
    ),
    Fault(
        name="the rejected picture is preferred",
        file="rollout/data/pictures.py",
        right="Picture(chosen, 1.0, columns), Picture(rejected, 0.0, columns)",
        wrong="Picture(chosen, 0.0, columns), Picture(rejected, 1.0, columns)",
        tests="tests/rollout/test_pictures.py -k chosen_and_rejected",
    ),
    Fault(
        name="a picture's draw starts at the same one each time",
        file="rollout/offline.py",
        right="passes[group] * self.group_size + ",
        wrong="",
        tests="tests/rollout/test_pictures.py -k equally_often",
    ),
    Fault(
        name="rising noise levels keep the pipeline's sign",
        file="rollout/lifting/step.py",
        right="[-velocity for velocity in predicted] if rising else predicted",
        wrong="predicted",
        tests="tests/rollout/test_zoo.py -k rising_levels",
    ),
)
