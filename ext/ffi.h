// The FFI handlers as opaque pointers, so that only one file includes XLA's header.
#pragma once

namespace kjax {

void* ffi_forward_handler();
void* ffi_backward_handler();

}  // namespace kjax
