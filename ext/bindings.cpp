// The module kjax._ext: arguments in, GIL released, exceptions out; no arithmetic.
#include "bind.h"
#include "mapped.h"

NB_MODULE(_ext, m) {
  nanobind::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const kjax::FileLost& lost) {
      PyErr_SetString(nanobind::module_::import_("kjax.errors").attr("CheckpointError").ptr(), lost.what());
    }
  });
  m.doc() = "SwiGLU experts on the host over checkpoint bytes. Arrays are C-contiguous; bfloat16 travels as uint16.";
  kjax::bind_store(m);
  kjax::bind_adapters(m);
  kjax::bind_calls(m);
  kjax::bind_machine(m);
}
