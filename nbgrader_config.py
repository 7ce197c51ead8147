"""How nbgrader makes assignments of the lessons and grades them: see docs/instructors.md.

`make assignments` and `make grade` read this file, and so does any `nbgrader` command given here.
"""

from nbclient.exceptions import DeadKernelError
from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbgrader import preprocessors as p
from nbgrader.utils import is_grade


class Run(p.Execute):
    """Run a notebook; if the kernel dies, say where."""

    def preprocess_cell(self, cell, resources, index):
        try:
            return super().preprocess_cell(cell, resources, index)
        except DeadKernelError as error:
            name = cell.metadata.get("nbgrader", {}).get("grade_id", f"cell {index + 1}")
            raise RuntimeError(f"the kernel ended in or before {name}: out of memory, or a call "
                               "of exit()") from error


class AllOrNothing(p.NbGraderPreprocessor):
    """A check passes unless it raises.  nbgrader itself gives 0 for a warning on stderr, and takes
    a number on a cell's last line for partial credit: both are shown, and neither counts.
    """

    def preprocess_cell(self, cell, resources, index):
        if is_grade(cell) and cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.name = "stdout"
                elif output.output_type == "execute_result":
                    output.output_type = "display_data"
                    del output["execution_count"]
        return cell, resources


c = get_config()  # noqa: F821 (nbgrader puts it there)

c.CourseDirectory.course_id = "minidiffuser"
c.CourseDirectory.source_directory = "notebooks"
c.CourseDirectory.release_directory = "classroom/release"
c.CourseDirectory.submitted_directory = "classroom/submitted"
c.CourseDirectory.autograded_directory = "classroom/autograded"
c.CourseDirectory.feedback_directory = "classroom/feedback"
c.CourseDirectory.solution_directory = "classroom/solution"
c.CourseDirectory.source_with_tests_directory = "classroom/source_with_tests"
c.CourseDirectory.db_url = "sqlite:///classroom/gradebook.db"

c.ExecutePreprocessor.timeout = 600  # seconds a cell may take
c.Execute.extra_arguments = ["--IPKernelApp.log_level=40"]  # errors only, not each start
c.OverwriteCells.add_missing_cells = True

# A saved slider keeps its pictures in the notebook's metadata: a student version starts without.
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", "language_info"}
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {
    "nbgrader", "deletable", "editable", "tags", "jupyter"}

# nbgrader's own order; ClearMetadataPreprocessor is ours.  Cells are saved before hidden tests go.
c.GenerateAssignment.preprocessors = [
    p.LockCells, p.ClearSolutions, p.ClearOutput, ClearMetadataPreprocessor, p.CheckCellMetadata,
    p.ComputeChecksums, p.SaveCells, p.ClearHiddenTests, p.ComputeChecksums, p.CheckCellMetadata]

c.Autograde.autograde_preprocessors = [
    Run, AllOrNothing, p.LimitOutput, p.SaveAutoGrades, p.AssignLatePenalties, p.CheckCellMetadata]
