"""Makes Triton's interpreter ready to run our kernels on a machine without a GPU."""

import os
import sys


def prepare_interpreter() -> None:
    """Set TRITON_INTERPRET=1, import triton, and mend it for numpy >= 2.4; call it before anything imports triton.

    Raises RuntimeError when triton was already imported without the interpreter: its own library is compiled then.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported without TRITON_INTERPRET=1: set it before the process starts")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor
    if patch_lang_tensor.__module__ == __name__:
        return

    # Triton 3.6 turns loop bounds into int(array of one element), which numpy 2.4 refuses.
    # TODO: drop when triton's interpreter calls .item() there.
    def patch_lang_tensor_for_numpy_24(tensor, scope) -> None:  # type: ignore[no-untyped-def]
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor_for_numpy_24
