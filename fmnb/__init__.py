__version__ = "0.1.0"

import warnings

# fastai 2.8.7 compiles two activations when imported, and PyTorch 2.14 warns of it: nothing a user can act on.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
