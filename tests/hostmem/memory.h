// The memory of the device: each storage of it owns one of the CPU, and shows another address.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

namespace hostmem {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex COUNT = 2;  // as in `_module` of __init__.py
constexpr uintptr_t OFFSET = uintptr_t{1} << 50;  // no such address can be read

inline thread_local c10::DeviceIndex current = 0;

inline c10::Device with_index(c10::Device device) {
  c10::DeviceIndex index = device.has_index() ? device.index() : current;
  TORCH_CHECK(index < COUNT, "hostmem: there is no device ", int(index), ", only ", int(COUNT));
  return {TYPE, index};
}

inline void release(void* context) {
  delete static_cast<c10::Storage*>(context);
}

inline c10::DataPtr data_of(const c10::Storage& host, c10::Device device) {
  auto address = reinterpret_cast<uintptr_t>(host.data());
  auto shown = reinterpret_cast<void*>(address ? address + OFFSET : 0);
  return {shown, new c10::Storage(host), &release, device};
}

inline c10::Storage host_storage(size_t bytes) {
  auto* cpu = c10::GetCPUAllocator();
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, cpu->allocate(bytes), cpu, true);
}

inline c10::Storage& host_of(const c10::Storage& storage) {
  auto* host = static_cast<c10::Storage*>(storage.data_ptr().get_context());
  TORCH_CHECK(host, "hostmem: a storage without memory");
  return *host;
}

// After an operation that may have given the host's storage other memory.
inline void follow(const c10::Storage& storage) {
  c10::Storage host = host_of(storage);
  c10::DataPtr data = data_of(host, storage.device());
  if (data.get() != storage.data() || host.nbytes() != storage.nbytes()) {
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(host.nbytes());
  }
}

}  // namespace hostmem
