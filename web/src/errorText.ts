/**
 * Server errors in Chinese, by their code, which does not change when the English message does.
 * In English, and for unknown codes, the server's message is shown.
 */

import { language } from "./i18n";

const chinese: Record<string, string> = {
  // Files
  encrypted: "文件受密码保护，或是旧的 .doc 格式：请另存为不带密码的 .docx 再上传",
  damaged: "文件已损坏，或过于复杂无法解析：请用原来的程序打开并重新保存",
  not_text: "不是文本，或编码无法识别：请保存为 UTF-8，或转换成 PDF",
  wrong_kind: "文件内容与扩展名不符",
  no_text: "文件中没有文字：扫描件和图片需要先做文字识别（OCR）",
  too_large: "文件太大，或解压后太大：请拆分后再上传",
  too_slow: "读取超时：请拆分文件，或换一种格式保存",
  unsafe: "文件结构可疑，可能是攻击：请用 Word 重新保存后再试",
  not_read: "服务未能读取此文件，文件本身未必有问题：请重新上传",
  partly: "部分内容未能读取",
  embedder_failed: "嵌入模型出错：请重新上传此文件",
  unexpected: "发生意外错误，详情见服务的日志",
  // Knowledge bases
  base_unreadable: "知识库无法读写：文件可能已损坏，或磁盘已满",
  embedder_unusable: "此服务上没有知识库所用的嵌入模型，或与创建时的模型不同",
  name_taken: "已有同名的知识库",
  invalid_name: "名称只能包含字母、汉字、数字、空格和 - _ .，最多 64 个字符，且不能以点开头",
  // Requests
  invalid_file_name: "文件名无效：请重命名后再上传",
  unsupported_file_type: "不支持此文件类型",
  file_too_large: "文件超过了服务允许的大小",
  body_too_large: "请求内容过大",
  body_timeout: "请求内容没有传完，连接已中断",
  file_busy: "另一个程序正在写入此文件，请稍后重试",
  disk_full: "服务所在的磁盘已满",
  model_not_found: "服务上没有此模型",
  licence_not_accepted: "请先接受此模型的许可证",
  pull_not_found: "此模型没有在下载",
  request_timeout: "回答用时超过了服务的限制",
  queue_full: "服务繁忙，请稍后重试",
  shutting_down: "服务正在关闭",
  not_enough_memory: "内存不足，无法加载此模型",
  model_unusable: "此模型目前无法使用，详情见服务的日志",
  revision_conflict: "此对话已在别处修改",
  generation_exists: "此消息的回答已经存在",
  generation_running: "此回答正在生成",
  generation_complete: "此回答已经结束，无法继续",
  message_exists: "此消息已有内容",
  offset_out_of_range: "读取位置超出了回答的长度",
  invalid_api_key: "API 密钥缺失或无效",
  host_not_allowed: "服务不接受此主机名",
  origin_not_allowed: "服务不接受来自其他网站的请求",
};

export function errorText(message: string, code: string | null): string {
  const isKnown = language.value === "zh" && code !== null && Object.hasOwn(chinese, code);
  return isKnown ? chinese[code]! : message;
}
