// CreateEpFactories: the library as a plugin execution provider of ONNX Runtime 1.24 and newer.
//
// The provider runs no nodes: it brings the operators of com.onnxcomp along, whose kernels belong to
// the CPU provider (and to the CUDA provider, where the library has them). For hosts that can load
// execution providers, but no libraries of custom operators.

#include "abi_plugin.h"

#include <memory>
#include <string>

#include "common/custom_op.h"

namespace onnxcomp {
namespace {

constexpr const char* kName = "OnnxCompExecutionProvider";
constexpr const char* kVendor = "onnxcomp";
// Members of later versions are not there to be read.
constexpr uint32_t kVersion = kPluginApiVersion;

struct Provider : OrtEp {
  Provider() : OrtEp{} {
    version = kVersion;
    GetName = [](const OrtEp*) { return kName; };
    GetCapability = [](OrtEp*, const OrtGraph*, OrtEpGraphSupportInfo*) -> OrtStatus* {
      return nullptr;  // no node is this provider's
    };
  }
};

struct Factory : OrtEpFactory {
  explicit Factory(const PluginApi& api_in);

  PluginApi api;
};

const Factory& Self(const OrtEpFactory* factory) { return *static_cast<const Factory*>(factory); }

// One device, the CPU: there the runtime offers the provider. The runtime copies the options of a
// device into session options the provider is added to, where they tell that the operators are known.
OrtStatus* ONNXCOMP_ABI SupportedDevices(OrtEpFactory* raw, const OrtHardwareDevice* const* devices,
                                         size_t count, OrtEpDevice** out, size_t most,
                                         size_t* made) {
  const PluginApi& api = Self(raw).api;
  return Guard(api, kVendor, [&] {
    *made = 0;
    for (size_t i = 0; i < count && *made < most && *made == 0; ++i) {
      if (api.HardwareDeviceType(devices[i]) != kHardwareCpu) continue;
      OrtKeyValuePairs* options = nullptr;
      api.CreateKeyValuePairs(&options);
      const std::string mark = kPluginMark;
      api.AddKeyValuePair(options, mark.substr(mark.rfind('.') + 1).c_str(), "1");
      OrtStatus* status = api.CreateEpDevice(raw, devices[i], nullptr, options, &out[*made]);
      api.ReleaseKeyValuePairs(options);
      Check(api, status);
      ++*made;
    }
  });
}

OrtStatus* ONNXCOMP_ABI CreateProvider(OrtEpFactory* raw, const OrtHardwareDevice* const*,
                                       const OrtKeyValuePairs* const*, size_t,
                                       const OrtSessionOptions*, const OrtLogger*, OrtEp** out) {
  *out = nullptr;
  return Guard(Self(raw).api, kVendor, [&] { *out = new Provider; });
}

OrtStatus* ONNXCOMP_ABI Domains(OrtEpFactory* raw, OrtCustomOpDomain** out, size_t count) {
  const PluginApi& api = Self(raw).api;
  return Guard(api, kVendor, [&] {
    if (count != 1) Fail("room for ", count, " domains, not 1");
    out[0] = DomainOf(api);
  });
}

Factory::Factory(const PluginApi& api_in) : OrtEpFactory{}, api(api_in) {
  version = kVersion;
  GetName = [](const OrtEpFactory*) { return kName; };
  GetVendor = [](const OrtEpFactory*) { return kVendor; };
  GetVendorId = [](const OrtEpFactory*) -> uint32_t { return 0; };
  GetVersion = [](const OrtEpFactory*) { return ONNXCOMP_VERSION; };
  GetSupportedDevices = SupportedDevices;
  CreateEp = CreateProvider;
  ReleaseEp = [](OrtEpFactory*, OrtEp* ep) { delete static_cast<Provider*>(ep); };
  // Memory and streams are the CPU provider's.
  CreateAllocator = [](OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*,
                       OrtAllocator** out) -> OrtStatus* {
    *out = nullptr;
    return nullptr;
  };
  ReleaseAllocator = [](OrtEpFactory*, OrtAllocator*) {};
  CreateDataTransfer = [](OrtEpFactory*, OrtDataTransferImpl** out) -> OrtStatus* {
    *out = nullptr;
    return nullptr;
  };
  IsStreamAware = [](const OrtEpFactory*) { return false; };
  CreateSyncStreamForDevice = [](OrtEpFactory*, const OrtMemoryDevice*, const OrtKeyValuePairs*,
                                 OrtSyncStreamImpl** out) -> OrtStatus* {
    *out = nullptr;
    return nullptr;
  };
  GetNumCustomOpDomains = [](OrtEpFactory*, size_t* count) -> OrtStatus* {
    *count = 1;
    return nullptr;
  };
  GetCustomOpDomains = Domains;
}

}  // namespace
}  // namespace onnxcomp

// The names of these functions, and the order of their parameters, are the runtime's.
extern "C" ONNXCOMP_EXPORT OrtStatus* CreateEpFactories(const char*, const OrtApiBase* base,
                                                        const OrtLogger*, OrtEpFactory** factories,
                                                        size_t most, size_t* made) {
  const onnxcomp::PluginApi api(base->GetApi(onnxcomp::kPluginApiVersion));
  if (api.table() == nullptr) {
    const onnxcomp::Api oldest(base->GetApi(1));
    return oldest.CreateStatus(onnxcomp::kFail,
                               "onnxcomp as an execution provider needs ONNX Runtime 1.24 or newer");
  }
  return onnxcomp::Guard(api, onnxcomp::kVendor, [&] {
    if (most < 1) onnxcomp::Fail("no room for a factory");
    factories[0] = new onnxcomp::Factory(api);
    *made = 1;
  });
}

extern "C" ONNXCOMP_EXPORT OrtStatus* ReleaseEpFactory(OrtEpFactory* factory) {
  delete static_cast<onnxcomp::Factory*>(factory);
  return nullptr;
}
