// The part of the ONNX Runtime C ABI that plugin execution providers need, declared from its
// documented order. It begins with API version 24: ONNX Runtime 1.24 is the first that asks a
// provider for operators.
#pragma once

#include "abi.h"

extern "C" {

struct OrtLogger;
struct OrtHardwareDevice;
struct OrtEpDevice;
struct OrtKeyValuePairs;
struct OrtGraph;
struct OrtNode;
struct OrtEpGraphSupportInfo;
struct OrtNodeComputeInfo;
struct OrtMemoryDevice;
struct OrtSyncStreamImpl;
struct OrtDataTransferImpl;

// A provider in a session. The runtime checks the version before it reads members that are newer;
// those that are not used are null.
struct OrtEp {
  uint32_t version;
  const char*(ONNXCOMP_ABI* GetName)(const OrtEp*);
  OrtStatus*(ONNXCOMP_ABI* GetCapability)(OrtEp*, const OrtGraph*, OrtEpGraphSupportInfo*);
  OrtStatus*(ONNXCOMP_ABI* Compile)(OrtEp*, const OrtGraph**, const OrtNode**, size_t count,
                                    OrtNodeComputeInfo**, OrtNode**);
  void(ONNXCOMP_ABI* ReleaseNodeComputeInfos)(OrtEp*, OrtNodeComputeInfo**, size_t count);
  void* unused[20];
};

// What makes providers, and says which devices and operators they have.
struct OrtEpFactory {
  uint32_t version;
  const char*(ONNXCOMP_ABI* GetName)(const OrtEpFactory*);
  const char*(ONNXCOMP_ABI* GetVendor)(const OrtEpFactory*);
  OrtStatus*(ONNXCOMP_ABI* GetSupportedDevices)(OrtEpFactory*, const OrtHardwareDevice* const*,
                                                size_t count, OrtEpDevice**, size_t most,
                                                size_t* made);
  OrtStatus*(ONNXCOMP_ABI* CreateEp)(OrtEpFactory*, const OrtHardwareDevice* const*,
                                     const OrtKeyValuePairs* const*, size_t count,
                                     const OrtSessionOptions*, const OrtLogger*, OrtEp**);
  void(ONNXCOMP_ABI* ReleaseEp)(OrtEpFactory*, OrtEp*);
  uint32_t(ONNXCOMP_ABI* GetVendorId)(const OrtEpFactory*);
  const char*(ONNXCOMP_ABI* GetVersion)(const OrtEpFactory*);
  void* ValidateCompiledModelCompatibilityInfo;
  OrtStatus*(ONNXCOMP_ABI* CreateAllocator)(OrtEpFactory*, const OrtMemoryInfo*,
                                            const OrtKeyValuePairs*, OrtAllocator**);
  void(ONNXCOMP_ABI* ReleaseAllocator)(OrtEpFactory*, OrtAllocator*);
  OrtStatus*(ONNXCOMP_ABI* CreateDataTransfer)(OrtEpFactory*, OrtDataTransferImpl**);
  bool(ONNXCOMP_ABI* IsStreamAware)(const OrtEpFactory*);
  OrtStatus*(ONNXCOMP_ABI* CreateSyncStreamForDevice)(OrtEpFactory*, const OrtMemoryDevice*,
                                                      const OrtKeyValuePairs*,
                                                      OrtSyncStreamImpl**);
  void* GetHardwareDeviceIncompatibilityDetails;
  void* CreateExternalResourceImporterForDevice;
  OrtStatus*(ONNXCOMP_ABI* GetNumCustomOpDomains)(OrtEpFactory*, size_t* count);
  OrtStatus*(ONNXCOMP_ABI* GetCustomOpDomains)(OrtEpFactory*, OrtCustomOpDomain**, size_t count);
};

}  // extern "C"

namespace onnxcomp {

constexpr uint32_t kPluginApiVersion = 24;

enum HardwareDeviceType : int { kHardwareCpu = 0 };

// Typed access to the slots that only plugins use. Methods that return OrtStatus* return null for
// success.
class PluginApi : public Api {
 public:
  using Api::Api;

  void CreateKeyValuePairs(OrtKeyValuePairs** out) const {
    At<void(OrtKeyValuePairs**)>(295)(out);
  }
  void AddKeyValuePair(OrtKeyValuePairs* pairs, const char* key, const char* value) const {
    At<void(OrtKeyValuePairs*, const char*, const char*)>(296)(pairs, key, value);
  }
  void ReleaseKeyValuePairs(OrtKeyValuePairs* pairs) const {
    At<void(OrtKeyValuePairs*)>(300)(pairs);
  }
  int HardwareDeviceType(const OrtHardwareDevice* device) const {
    return At<int(const OrtHardwareDevice*)>(307)(device);
  }
  OrtStatus* CreateEpDevice(OrtEpFactory* factory, const OrtHardwareDevice* device,
                            const OrtKeyValuePairs* metadata, const OrtKeyValuePairs* options,
                            OrtEpDevice** out) const {
    // The first slot of the table of functions for providers.
    using F = OrtStatus*(ONNXCOMP_ABI*)(OrtEpFactory*, const OrtHardwareDevice*,
                                        const OrtKeyValuePairs*, const OrtKeyValuePairs*,
                                        OrtEpDevice**);
    return (*At<const F*()>(317)())(factory, device, metadata, options, out);
  }
};

}  // namespace onnxcomp
