"""Writes tests/tensorflow_checkpoint/ with TensorFlow, which the tests do not need.

The files there are those of TensorFlow 2.21.0 (tensorflow-cpu): python tests/make_tensorflow_checkpoint.py
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "tensorflow_checkpoint"
DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
KERNEL_SHAPE = (3, 3, 2, 4)


def main() -> None:
    """Two data files, every dtype, a scalar, an empty variable, a string and a partitioned variable."""
    tensorflow = import_module("tensorflow")
    tf: Any = tensorflow.compat.v1
    tf.disable_eager_execution()
    two_devices = tf.ConfigProto(device_count={"CPU": 2})
    with tf.Graph().as_default(), tf.Session(config=two_devices) as session:

        def variable(name: str, value: Any, dtype: str) -> None:
            tf.get_variable(name, initializer=tf.constant(value, dtype))

        with tf.device("/cpu:0"):
            for dtype in DTYPES:
                zero_to_five = [[False, True, True], [True] * 3] if dtype == "bool" else [[0, 1, 2], [3, 4, 5]]
                variable(f"dtypes/{dtype}", zero_to_five, dtype)
            variable("text", [b"not", b"numbers"], "string")
        with tf.device("/cpu:1"):
            kernel = np.arange(np.prod(KERNEL_SHAPE)).reshape(KERNEL_SHAPE) / 8
            variable("inpaint_net/conv1/kernel", kernel, "float32")
            variable("inpaint_net/conv1/kernel/Adam", 0 * kernel, "float32")
            variable("inpaint_net/conv1/bias", [0.5, -0.5, 1.5, -1.5], "float32")
            variable("empty", np.zeros((0, 3)), "float32")
            variable("global_step", 430000, "int64")
            partitions = tf.fixed_size_partitioner(2)
            tf.get_variable("partitioned", initializer=tf.constant([[1.0], [2.0], [3.0]]), partitioner=partitions)
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(sharded=True, write_version=tf.train.SaverDef.V2, save_relative_paths=True)
        saver.save(session, str(FOLDER / "snap"), global_step=7, write_meta_graph=False)
    print(f"TensorFlow {tensorflow.__version__}:", *sorted(path.name for path in FOLDER.iterdir()))


if __name__ == "__main__":
    main()
