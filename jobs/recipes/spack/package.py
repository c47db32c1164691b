"""For Spack: `spack repo create REPO`, put this file into its packages/py_apts_mpi/, and from the source tree
`spack dev-build py-apts-mpi@0.1.0` builds what lies there.
"""

from spack.package import depends_on, license, variant, version
from spack_repo.builtin.build_systems.python import PythonPackage


class PyAptsMpi(PythonPackage):
    """Additively preconditioned trust-region training of neural networks over MPI."""

    homepage = "https://arxiv.org/abs/2512.14286"

    license("MIT")

    version("0.1.0")

    variant("plot", default=True, description="Pictures of runs")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-setuptools-scm@8", type="build")

    depends_on("py-h5py@3.10:", type=("build", "run"))
    depends_on("py-jsonargparse@4.35: +signatures", type=("build", "run"))
    depends_on("py-mpi4py@4.1:", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-pyyaml@6:", type=("build", "run"))
    depends_on("py-rich@13:", type=("build", "run"))
    depends_on("py-torch@2.4:2", type=("build", "run"))

    depends_on("py-matplotlib@3.8:", when="+plot", type="run")
    depends_on("py-scipy@1.11:", when="+plot", type="run")
