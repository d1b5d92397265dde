// What torch asks of a device: its allocator, which device is current, streams, generators.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

namespace {

using namespace hostmem;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return data_of(host_storage(bytes), {TYPE, current});
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    auto real = [](const void* p) { return reinterpret_cast<void*>(uintptr_t(p) - OFFSET); };
    default_copy_data(real(to), real(from), bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(TYPE, &allocator);

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  return std::exchange(current, with_index({TYPE, index}).index());
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device d) const override { return {TYPE, exchange(d.index())}; }
  c10::Device getDevice() const override { return {TYPE, current}; }
  void setDevice(c10::Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current = d.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  // An operation has run when its call returns: there is one stream, and nothing to wait for.
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchange(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return exchange(index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchange(index);
  }
  // Its random numbers are those of the CPU.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::Storage larger = host_storage(bytes);
    c10::Storage host = host_of(storage);
    std::memcpy(larger.mutable_data(), host.data(), std::min(bytes, host.nbytes()));
    auto* impl = host.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(larger.set_data_ptr(c10::DataPtr()));
    impl->set_nbytes(bytes);
    follow(storage);
  }
};

Hooks hooks;
[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

}  // namespace
