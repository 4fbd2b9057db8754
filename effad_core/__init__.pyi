"""The public names: `__init__.py` reads here which module each one is loaded from."""

from .acceleration.devices import choose_device as choose_device
from .datasets import Sample as Sample
from .datasets import Scenario as Scenario
from .datasets import open_pretraining as open_pretraining
from .datasets import open_scenario as open_scenario
from .deployment.inspection import fit_thresholds as fit_thresholds
from .deployment.inspection import inspect_images as inspect_images
from .deployment.onnx import export as export
from .deployment.prepared import prepare as prepare
from .detector import EfficientAD as EfficientAD
from .distillation.algorithm import distill as distill
from .distillation.extractors import open_extractor as open_extractor
from .distillation.schedule import DistillationSchedule as DistillationSchedule
from .distillation.teacher_check import TeacherReport as TeacherReport
from .distillation.teacher_check import teacher_report as teacher_report
from .errors import DataError as DataError
from .errors import RunError as RunError
from .evaluation.scores import Evaluation as Evaluation
from .evaluation.scores import evaluate as evaluate
from .explorer import ThresholdExplorer as ThresholdExplorer
from .extensions.puad import PUAD as PUAD
from .networks import Autoencoder as Autoencoder
from .networks import PatchDescriptionNetwork as PatchDescriptionNetwork
from .prediction import Prediction as Prediction
from .schedule import Schedule as Schedule
from .thresholds import OperatingPoint as OperatingPoint
from .tiles.cutting import Tiles as Tiles
from .training import train as train

__version__: str
