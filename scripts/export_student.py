"""Give a student to openpi, LeRobot, TensorRT or plain JAX.

uv run scripts/export_student.py --help tells more.
"""

from shallow_pi.commands import export_student

if __name__ == "__main__":
    export_student.main()
