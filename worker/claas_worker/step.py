"""One training step, read top to bottom: load the version, render both contexts, score, train, save, report.

Knows nothing of Kubernetes: a `Job` in, a `Result` out, or an error with a `reason`. Nothing of an attempt becomes a
version unless everything went well: the manifest is written last, and nothing is written before the guards have passed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from claas_crds.model import explain
from claas_crds.reasons import Outcome, Reason, describe
from claas_crds.request import Metadata, Payload, Result, Sample, Timings, Training
from claas_store import ...
from claas_worker.errors import AdapterInvalid, EmptyResponse, LogprobLengthMismatch, PayloadInvalid
from claas_worker.job import InvalidSpec, Job, Report, Unfit, now
from claas_worker.optim import AdapterOptimizer
from claas_worker.render import Limits, Rendered, render
from claas_worker.score import Question, Scored, Scorer
from claas_worker.sdpo import NO_SIGNAL_JSD, anchor_kl, combine, logprobs_from_hidden, sdpo_loss_from_hidden
from claas_worker.student import Adapter, Context, Student

log = logging.getLogger(__name__)

STALE_RATIO = 0.2  # |mean importance ratio - 1| beyond it: the rollout was another policy's, or misaligned


class TrainingStep:
    """Runs jobs one after another on one student.

    Args:
        student: the base model; bit-identical after every job, however it ends.
        scorer: asks the teacher.
        limits: token limits of prompts and responses.
    """

    def __init__(self, student: Student, scorer: Scorer, limits: Limits) -> None:
        self._student, self._scorer, self._limits = student, scorer, limits

    def __call__(self, job: Job, report: Report) -> Result:
        """Trains `job.parent` on the job's samples and writes the new version.

        Raises:
            GuardError, StoreError, TeacherError, InvalidSpec: each with its `reason`; no version was made.
            Unfit: this process should end.
        """
        try:
            return self._adopt(job) or self._run(job, report)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise Unfit(f"the device failed or is out of memory ({type(error).__name__})") from error
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch's word on the CPU
                raise Unfit("out of memory") from error
            raise
