"""Export a student for openpi, LeRobot, TensorRT or plain JAX.

uv run scripts/export_student.py --help shows all options.
"""

from shallow_pi.commands import export_student

if __name__ == "__main__":
    export_student.main()
